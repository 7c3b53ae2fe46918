"""Arguments of `load` that are checked before the model is opened."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ov_phi3.checks import whole_number
from ov_phi3.engine.limits import seconds
from ov_phi3.errors import ConfigError
from ov_phi3.files import expanded
from ov_phi3.text.template import ChatTemplate

if TYPE_CHECKING:
    from ov_phi3.backends.protocol import BackendSpec
    from ov_phi3.model.info import ModelInfo

__all__ = ["OWN_BACKEND", "Unloading", "check_arguments", "check_concurrency"]

OWN_BACKEND = "infer_request"
"""The backend that runs several requests at once, and drafts as many tokens as pay: GenAI drafts a fixed number."""

_MAX_CONCURRENCY = 256


def check_arguments(
    info: ModelInfo,
    context_length: int | None,
    prefill_chunk: int | None,
    template: object,
) -> None:
    """Refuse values that no model and no backend can have.

    Raises:
        ConfigError: a number out of range.
        TypeError: an argument of the wrong type.
    """
    if template is not None and not isinstance(template, ChatTemplate):
        raise TypeError(f"template must be a ChatTemplate such as ChatTemplate.phi3(), not {template!r}")
    if context_length is not None:
        most, note = info.context_length, ", the model's own"
        whole_number("context_length", context_length, "tokens", least=2, most=most, note=note)
    if prefill_chunk is not None:
        whole_number("prefill_chunk", prefill_chunk, "tokens", least=0, note=", or 0 for whole prompts")


def check_concurrency(concurrency: int, spec: BackendSpec) -> None:
    """Refuse a number of requests at once that is out of range, or that the backend cannot run.

    Args:
        concurrency: requests that run at once.
        spec: the backend.

    Raises:
        ConfigError: as above.
        TypeError: not a whole number.
    """
    whole_number("concurrency", concurrency, "requests", least=1, most=_MAX_CONCURRENCY, note=" at once")
    if concurrency > 1 and not spec.capabilities.schedules:
        raise ConfigError(
            f"concurrency={concurrency} does not work with backend={spec.capabilities.name!r}, which runs one request "
            f"after another; expected concurrency=1. Leave out the backend, or take backend={OWN_BACKEND!r}, which "
            "runs several at once."
        )


@dataclass(frozen=True)
class Unloading:
    """How the model leaves memory.

    Attributes:
        after_s: seconds without a request after which it does so by itself; None for never.
        directory: where keys and values of chats are then; None for nowhere.
    """

    after_s: float | None
    directory: Path | None

    @classmethod
    def of(cls, after: float | None, directory: str | os.PathLike[str] | None, spec: BackendSpec) -> Unloading:
        """The checked arguments of `load`.

        Raises:
            ConfigError: a number out of range, no directory, one that cannot be written to, or a backend whose cache
                cannot be read.
            TypeError: an argument of the wrong type.
        """
        if after is not None:
            seconds("idle_unload", after)
        if directory is None:
            return cls(after, None)
        name, path = spec.capabilities.name, expanded(directory)
        if not spec.capabilities.saves_kv:
            raise ConfigError(
                f"unload_dir={str(directory)!r} does not work with backend={name!r}, whose cache cannot be read; leave "
                f"it out, or take backend={OWN_BACKEND!r}."
            )
        if not path.is_dir():
            raise ConfigError(f"unload_dir={str(directory)!r} is not a directory; make it first.")
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as exc:
            reason = exc.strerror or exc
            raise ConfigError(f"unload_dir={str(directory)!r} cannot be written to: {reason}; take another.") from exc
        return cls(after, path)
