"""Token ids to text as they arrive: only whole characters, no piece of a stop string, nothing lost.

Both classes here are pure and take constant time per token: `add` what is new, `flush` at the end. What they give,
put together, is what the full decode gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable

__all__ = ["StopMatcher", "StreamDecoder"]


class StreamDecoder:
    """Decodes a growing list of ids.

    Bytes that are not a whole character yet wait for the next token. Bytes that can never become one turn into U+FFFD
    as in Python's and Unicode's recommended practice (Unicode 16, section 3.9, "maximal subparts").

    Args:
        token_bytes: an id's bytes.
        skipped: ids that give no text.
        strips_space: take one space off the start of the text, which SentencePiece's mark leaves there.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], *, skipped: Collection[int] = (), strips_space: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._at_start = strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        raw = b"".join(self._token_bytes(i) for i in ids if i not in self._skipped)
        if self._at_start and raw:
            self._at_start = False
            raw = raw[1:] if raw.startswith(b" ") else raw
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What is left: U+FFFD if the last bytes were only part of a character."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Holds text back while it may be the beginning of a stop string.

    The stop string that is complete first ends the text, whatever pieces the text came in; of two that end together,
    the one that began first.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Collection[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(s) for s in self._stops), default=0)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The part of the text so far that can be shown; after a match nothing more comes."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        seen = self._held + text
        ends = [(at + len(s), at, s) for s in self._stops if (at := seen.find(s)) >= 0]
        if ends:
            end, at, self.matched = min(ends)
            self._held = ""
            return seen[: end if self._include else at]
        keep = self._possible_start(seen)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        """What was held back, when no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that some stop string begins with."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(s.startswith(tail) for s in self._stops):
                return size
        return 0
