"""Stop strings in streamed text: cut the text at the first match, show no part of a stop string before.

Pure Python, constant time per chunk. Without a match, the results of all `add` calls and of `flush`, joined, equal the
input.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.text.stream_decoder import StreamDecoder

__all__ = ["StopMatcher", "StopWatch"]


class StopMatcher:
    """Find the first stop string in text that comes in chunks, and hold back text that may be the start of one.

    The stop string that is complete first ends the text, however the text is split into chunks. If two are complete at
    the same character, the one that starts earlier ends it.

    Args:
        stops: the stop strings.
        include: keep the matched stop string in the text.

    Attributes:
        matched: the stop string that ended the text; None while there is no match.
    """

    def __init__(self, stops: Collection[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._max_length = max((len(stop) for stop in self._stops), default=0)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def add(self, chunk: str) -> str:
        """Take the next chunk; return the text that can be shown now. After a match it is always empty."""
        if not self._stops:
            return chunk
        if self.matched is not None:
            return ""
        text = self._held + chunk
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._include else start]
        shown = len(text) - self._partial_match(text)
        self._held = text[shown:]
        return text[:shown]

    def fork(self) -> StopMatcher:
        """A matcher that continues from here by itself."""
        return copy.copy(self)

    def flush(self) -> str:
        """Return the text held back at the end of the reply, which was not part of a stop string."""
        held, self._held = self._held, ""
        return held

    def end(self, rest: str, control: str | None = None) -> str:
        """Take the rest of the text at the end of the reply; return what can be shown of it.

        Args:
            rest: the last characters.
            control: the stop string that is the control token which ended the reply, and has no text of its own.
        """
        shown = self.add(rest) + self.flush()
        if control is not None and self.matched is None:
            self.matched = control
            shown += control if self._include else ""
        return shown

    def _partial_match(self, text: str) -> int:
        """Length in characters of the longest end of `text` that is the start of a stop string."""
        for length in range(min(self._max_length - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class StopWatch:
    """Tells a backend that runs several sequences at once which of them a stop string has ended.

    Args:
        decoder: decodes the reply.
        matcher: finds its stop strings.
    """

    def __init__(self, decoder: StreamDecoder, matcher: StopMatcher) -> None:
        self._decoder = decoder
        self._matcher = matcher

    def add(self, token_id: int) -> bool:
        """Take the next token; returns whether a stop string is complete."""
        self._matcher.add(self._decoder.add((token_id,)))
        return self._matcher.matched is not None

    def fork(self) -> StopWatch:
        """A watch that continues from here by itself."""
        return StopWatch(self._decoder.fork(), self._matcher.fork())
