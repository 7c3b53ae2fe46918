"""How many prefill tokens a step may compute beside decodes, so that the running replies do not wait long."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.backends.paged.model_runner import ScheduledTokens

__all__ = ["Pace"]

_STRETCH = 2.5  # a step with prefill takes at most this many times as long as one without
_MAX_STRETCH = 6.0  # the same where more requests wait for their prompts than would wait for the step
_UNSTREAMED_STRETCH = 16.0  # where nobody reads along; a timeout or `cancel` still waits for the step
_FIRST_BUDGET = 16  # tokens, until the times are known
_MAX_BUDGET = 2048
_MIN_BUDGET = 8  # a smaller chunk is hardly faster
_WEIGHT = 0.2  # of the newest time in a moving average
_WEIGHT_OF_LESS = 0.5  # the same where it is lower: a high time may be the clock of a busy machine


class Pace:
    """Times of steps by their number of tokens, and the budget that follows from them.

    A pass takes longer if its number of tokens is not that of the pass before (a CPU then prepares every node of the
    graph again), and its time is far from proportional to that number. So the times are kept for passes whose number
    changed, as a step with prefill is one when it begins, and apart from those of a reply's ordinary steps.
    """

    def __init__(self) -> None:
        self._decode = _Times()
        self._changed = _Times()
        self._before = 0  # tokens of the last pass

    def prefill_budget(self, decoding: int = 1, prefilling: int = 1, streamed: bool = True) -> int:
        """Most prefill tokens in a step that also decodes.

        Args:
            decoding: requests that have a reply; their next token comes with the step.
            prefilling: requests whose first token is waited for. If they are the majority, the step may take longer in
                their favour.
            streamed: somebody reads one of the replies as it comes. If not, only their ends count, which come sooner
                with few long steps.
        """
        rows = max(1, decoding)
        decode_s = self._decode.at(rows)
        if decode_s is None or not self._changed:
            return _FIRST_BUDGET
        stretch = min(max(_STRETCH, 1.0 + prefilling / rows), _MAX_STRETCH) if streamed else _UNSTREAMED_STRETCH
        tokens = self._changed.most_tokens(stretch * decode_s) - rows
        return min(max(_MIN_BUDGET, tokens), _MAX_BUDGET)

    def note(self, parts: Sequence[ScheduledTokens], seconds: float) -> None:
        """Note the time of a step."""
        tokens = sum(part.count for part in parts)
        if tokens != self._before:
            self._changed.note(tokens, seconds, skip_first=True)  # the first one may hold the compilation of kernels
        elif all(part.sequence.is_decoding for part in parts):
            self._decode.note(tokens, seconds)
        self._before = tokens


class _Times:
    """Moving averages of the time of a pass for some numbers of tokens."""

    def __init__(self) -> None:
        self._tokens: list[int] = []  # ascending
        self._seconds: dict[int, float] = {}
        self._seen: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def note(self, tokens: int, seconds: float, *, skip_first: bool = False) -> None:
        """Note a time; with `skip_first` only if there was a pass of this many tokens before."""
        tokens -= tokens % (1 << max(0, tokens.bit_length() - 3))  # few numbers: eight in a power of two
        if skip_first and tokens not in self._seen:
            self._seen.add(tokens)
            return
        before = self._seconds.get(tokens)
        if before is None:
            bisect.insort(self._tokens, tokens)
            self._seconds[tokens] = seconds
        else:
            self._seconds[tokens] += (_WEIGHT if seconds > before else _WEIGHT_OF_LESS) * (seconds - before)

    def at(self, tokens: int) -> float | None:
        """The time for a number of tokens, or for the nearest number whose time is known."""
        if not self._tokens:
            return None
        return self._seconds[min(self._tokens, key=lambda known: abs(known - tokens))]

    def most_tokens(self, seconds: float) -> int:
        """The number of tokens that takes this long: between two known times in proportion, beyond them all too."""
        fits = [index for index, tokens in enumerate(self._tokens) if self._seconds[tokens] <= seconds]
        if not fits:
            return 0
        tokens = self._tokens[fits[-1]]
        known = self._seconds[tokens]
        if fits[-1] + 1 == len(self._tokens):
            return _MAX_BUDGET if tokens * seconds >= _MAX_BUDGET * known else int(tokens * seconds / known)
        more = self._tokens[fits[-1] + 1]
        return tokens + int((more - tokens) * (seconds - known) / (self._seconds[more] - known))
