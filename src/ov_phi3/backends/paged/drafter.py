"""Draft tokens: guesses of the next tokens of a sequence, which one step of the model checks together.

A step computes the logits of the last token and of all draft tokens. The reply takes the tokens that it chooses from
these logits up to the first one that differs from its draft, so that drafts change the number of steps and not the
reply. A drafter knows nothing of logits or sampling.

How many tokens are drafted follows from the sequence's own ids and from a table of what steps cost, which is fixed: a
prompt has the same drafts every time, whatever else runs. The drafter predicts every token, also those that it does not
draft, and counts how often it was right. Text that does not repeat costs no pass to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Drafter", "HitRate"]

_SLOWEST_WEIGHT = 0.06  # of the newest outcome in a moving average


@dataclass(slots=True)
class HitRate:
    """How often predictions of one kind were right.

    Attributes:
        rate: a moving average, which begins with an estimate.
        outcomes: how many it holds; the estimate counts for three.
    """

    rate: float
    outcomes: int = 3

    def note(self, right: bool) -> None:
        """Note whether a prediction was right."""
        self.outcomes += 1
        self.rate += max(_SLOWEST_WEIGHT, 1.0 / self.outcomes) * (right - self.rate)


class Drafter(Protocol):
    """Guesses the next tokens of one sequence."""

    def add(self, ids: Sequence[int]) -> None:
        """Note ids that the sequence has now."""
        ...

    def draft(self, most: int) -> list[int]:
        """The next tokens, at most `most` and possibly none."""
        ...

    def close(self) -> None:
        """Give up what it holds: the sequence has ended."""
        ...
