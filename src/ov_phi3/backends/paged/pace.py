"""How many prefill tokens a step may compute beside decodes, so that the running replies do not wait long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.backends.paged.model_runner import ScheduledTokens

__all__ = ["Pace"]

_STRETCH = 2.0  # a step with prefill takes at most this many times as long as one without
_MAX_STRETCH = 6.0  # the same where more requests wait for their prompts than would wait for the step
_FIRST_BUDGET = 16  # tokens, until the times are known
_MAX_BUDGET = 2048
_MIN_BUDGET = 8  # a smaller chunk is hardly faster; and of single tokens no prefill time could be learned
_WEIGHT = 0.2  # of the newest time in a moving average
_WEIGHT_OF_LESS = 0.5  # the same where it is lower: a high time may hold the compilation of kernels


class Pace:
    """Moving averages of the time of steps, and the budget that follows from them."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._prefill_token_s: float | None = None

    def prefill_budget(self, decoding: int = 1, prefilling: int = 1) -> int:
        """Most prefill tokens in a step that also decodes.

        Args:
            decoding: requests that have a reply; their next token comes with the step.
            prefilling: requests whose first token is waited for. If they are the majority, the step may take longer in
                their favour.
        """
        if self._decode_s is None or self._prefill_token_s is None:
            return _FIRST_BUDGET
        stretch = min(max(_STRETCH, 1.0 + prefilling / max(1, decoding)), _MAX_STRETCH)
        room_s = (stretch - 1.0) * self._decode_s
        if room_s >= _MAX_BUDGET * self._prefill_token_s:
            return _MAX_BUDGET
        return max(_MIN_BUDGET, int(room_s / self._prefill_token_s))

    def note(self, parts: Sequence[ScheduledTokens], seconds: float) -> None:
        """Note the time of a step."""
        prefill = sum(part.known for part in parts if not part.sequence.is_decoding)
        if not prefill:
            self._decode_s = _average(self._decode_s, seconds)
        elif len(parts) == 1 or self._decode_s is None:
            self._prefill_token_s = _average(self._prefill_token_s, seconds / prefill)
        elif seconds > self._decode_s:  # otherwise the time of the prefill is lost in the noise
            self._prefill_token_s = _average(self._prefill_token_s, (seconds - self._decode_s) / prefill)


def _average(before: float | None, value: float) -> float:
    if before is None:
        return value
    return before + (_WEIGHT if value > before else _WEIGHT_OF_LESS) * (value - before)
