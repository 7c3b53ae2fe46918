"""Segments: the parts of a prompt, each a control token or text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ov_phi3.errors import PromptError

__all__ = ["Raw", "Segment", "check_encodable", "joined"]


class Raw(str):
    """Prompt text that may contain control tokens: `Raw("<|user|>Hi<|end|><|assistant|>")`.

    Control-token text in it becomes control tokens. The chat template is not applied.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Raw({super().__repr__()})"


class Segment(NamedTuple):
    """A part of a prompt.

    Attributes:
        text: the text.
        control: whether `text` names a control token; otherwise it is plain text.
    """

    text: str
    control: bool


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same segments with neighbouring texts joined, and without empty ones."""
    result: list[Segment] = []
    for segment in segments:
        if result and not segment.control and not result[-1].control:
            result[-1] = Segment(result[-1].text + segment.text, False)
        elif segment.text:
            result.append(segment)
    return result


def check_encodable(text: str) -> None:
    """Refuse a text that UTF-8 cannot encode.

    Raises:
        PromptError: the text holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise PromptError(
            f"the text holds a lone surrogate, {text[exc.start]!r} at character {exc.start}, which is half a "
            "character. Decode the bytes it came from with errors='replace'."
        ) from exc
