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

from ov_phi3.backends.paged.step_costs import DraftPlan, Offer, StepCosts

__all__ = ["Drafter", "HitRate", "LookupDrafter"]

_NGRAM_SIZES = (8, 4, 2, 1)  # of the index, the longest first
_LONGEST = 32  # tokens of a match that are counted
_SLOWEST_WEIGHT = 0.06  # of the newest outcome in a moving average
# How often a prediction is taken to be right before anything is known of a text, by the length of its match, from so
# many tokens on, and by its kind. The outcomes correct these estimates.
_LENGTHS = (1, 2, 3, 4, 6, 9, 16)
# The n-gram occurred once; its last two occurrences went on alike, or not; a long match that was interrupted.
_UNIQUE, _AGREED, _DISAGREED, _RESUMED = range(4)
_LEAST_INTERRUPTED = 4  # tokens of a match that is taken up again behind what interrupted it
_LONGEST_GAP = 8  # tokens of the source that what interrupted it may replace
_RATES = (
    (0.25, 0.5, 0.6, 0.7, 0.75, 0.85, 0.92),
    (0.35, 0.5, 0.6, 0.7, 0.75, 0.85, 0.92),
    (0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8),
    (0.6, 0.7, 0.7, 0.7, 0.8, 0.9, 0.9),
)

_RUN = 3  # right predictions in a row: then some credit is lent


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


class LookupDrafter:
    """Guesses that the sequence goes on as it did after an earlier occurrence of its last tokens.

    Every n-gram of some sizes is indexed by its last position, so that a token takes constant time. A match is followed
    for as long as it predicts the right token, which makes it longer; the longer it is, the more often it is right.

    Args:
        ids: the sequence so far.
        costs: what steps cost.
        number: how many tokens are drafted wherever there is a match; default: what is expected to be fastest.
        sizes: sizes of the n-grams, the longest first.
    """

    def __init__(
        self,
        ids: Sequence[int],
        costs: StepCosts,
        number: int | None = None,
        sizes: Sequence[int] = _NGRAM_SIZES,
    ) -> None:
        self._ids: list[int] = []
        self._costs = costs
        self._number = number
        self._index: dict[int, dict[int, tuple[int, int]]] = {size: {} for size in sizes}  # last two positions
        self._source = -1  # position of the token that is expected next; -1 for none
        self._matched = 0
        self._kind = _UNIQUE
        self._rates = [[HitRate(rate) for rate in rates] for rates in _RATES]
        self._plan = DraftPlan()
        self._run = 0  # right predictions in a row
        self._interrupted = -1  # where in the text a long match ended
        self._start(ids)

    def _start(self, ids: Sequence[int]) -> None:
        """Index a prompt at once; its own repetitions say nothing about the reply."""
        self._ids = list(ids)
        for size, index in self._index.items():
            for end in range(size, len(ids)):
                key = hash(tuple(self._ids[end - size : end]))
                index[key] = (end, index[key][0] if key in index else -1)
        self._find()
        self._remember()

    def add(self, ids: Sequence[int]) -> None:
        """Note ids that the sequence has now: whether they were expected, and what may come next."""
        self._plan.earn(len(ids))
        for token in ids:
            expected = self._ids[self._source] if self._source >= 0 else None
            self._ids.append(token)
            if expected is not None:
                self._learn(token == expected)
                self._run = self._run + 1 if token == expected else 0
            if token == expected:
                self._source += 1
                self._matched = min(self._matched + 1, _LONGEST)
            else:
                replaced = self._matched >= _LEAST_INTERRUPTED
                if replaced:
                    self._interrupted = self._source
                self._find()
                if self._matched < 2 and (resumed := self._resumed(replaced)) >= 0:
                    self._source, self._matched, self._kind = resumed, 1, _RESUMED
            self._remember()

    def draft(self, most: int) -> list[int]:
        """The next tokens, at most `most` and possibly none."""
        if self._number is not None:
            return self.predicted(min(most, self._number)) if self._source >= 0 else []
        costs = self._costs
        choice = self._plan.choose([Offer(costs, self.chances(min(most, costs.most_drafts)))], most, self.confident)
        self._plan.take(choice.rows, choice.cost)
        return self.predicted(choice.rows - 1)

    def close(self) -> None:
        """Nothing: it holds only ids."""

    @property
    def confident(self) -> bool:
        """Whether its last predictions were right."""
        return self._run >= _RUN

    def chances(self, most: int) -> list[float]:
        """Of each prediction, at most so many, how likely it is right if those before it are; [] without a match."""
        rates = self._rates[self._kind]
        ahead = range(most if self._source >= 0 else 0)
        return [rates[_LENGTH_CLASS[min(self._matched + i, _LONGEST)]].rate for i in ahead]

    def predicted(self, count: int) -> list[int]:
        """The next tokens by the match that is followed; without one the last token, which fills the rows."""
        known, source = len(self._ids), self._source
        if source < 0:
            return [self._ids[-1]] * count
        drafts: list[int] = []
        for at in range(source, source + count):  # past its own end the text repeats with the period of the match
            drafts.append(self._ids[at] if at < known else drafts[at - known])
        return drafts

    def _learn(self, right: bool) -> None:
        self._rates[self._kind][_LENGTH_CLASS[self._matched]].note(right)

    def _find(self) -> None:
        """Look for the last tokens at an earlier place, the longest n-gram first."""
        ids = self._ids
        self._source, self._matched = -1, 0
        for size, index in self._index.items():
            source, before = index.get(hash(tuple(ids[-size:])), (-1, -1))
            length = self._common_end(source)
            if length >= size:  # otherwise there is none, or another n-gram with the same hash
                self._source, self._matched = source, length
                agrees = before >= 0 and ids[before] == ids[source]
                self._kind = _UNIQUE if before < 0 else _AGREED if agrees else _DISAGREED
                return

    def _resumed(self, replaced: bool) -> int:
        """Where an interrupted match may go on: behind the last token, or, if one was replaced, behind that; else -1.

        A record repeats the structure of the one before with other values, a quotation leaves words out.
        """
        start, last = self._interrupted, len(self._ids) - 1
        if start < 0:
            return -1
        for at in range(start, min(start + _LONGEST_GAP, last)):
            if self._ids[at] == self._ids[last]:
                return at + 1
        return start + 1 if replaced and start + 1 < last else -1

    def _common_end(self, source: int) -> int:
        """Tokens in front of a position that are also the last ones."""
        ids, last, length = self._ids, len(self._ids), 0
        while length < min(source, _LONGEST) and ids[source - 1 - length] == ids[last - 1 - length]:
            length += 1
        return length

    def _remember(self) -> None:
        """Index the n-grams that end with the last token; after `_find`, which must not find them."""
        ids = self._ids
        for size, index in self._index.items():
            if len(ids) >= size:
                key = hash(tuple(ids[-size:]))
                index[key] = (len(ids), index[key][0] if key in index else -1)


_LENGTH_CLASS = tuple(
    max((at for at, least in enumerate(_LENGTHS) if matched >= least), default=0) for matched in range(_LONGEST + 1)
)
