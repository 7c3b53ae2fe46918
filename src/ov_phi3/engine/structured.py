"""A structured reply that has ended: its value, and whether it is what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ov_phi3.backends.paged.constraint import matches
from ov_phi3.errors import GenerationError
from ov_phi3.generation.json_schema import value_of

if TYPE_CHECKING:
    from ov_phi3.generation.config import GenerationConfig

__all__ = ["parsed_reply"]


def parsed_reply(config: GenerationConfig, text: str, *, whole: bool) -> Any:
    """The value of a reply with `json_schema`; None without a schema, and if it was cut off.

    Args:
        config: fully resolved.
        text: the reply.
        whole: it ended by itself: no limit, stop string or cancellation cut it off.

    Raises:
        GenerationError: a whole reply is not of its structure.
    """
    kind = config.structure
    if kind is None or not whole:
        return None
    if kind == "json_schema":
        try:
            return value_of(text, config.json_schema)  # type: ignore[arg-type]  # it is text in a resolved config
        except ValueError as exc:
            raise _violated(kind, text, str(exc)) from exc
    if matches(kind, getattr(config, kind), text) is False:
        raise _violated(kind, text, f"it does not match {getattr(config, kind)[:80]!r}")
    return None


def _violated(kind: str, text: str, problem: str) -> GenerationError:
    return GenerationError(
        f"the reply is not of its {kind}: {problem}. It was {text[:80]!r}. Try backend='infer_request', or a simpler "
        f"{kind}."
    )
