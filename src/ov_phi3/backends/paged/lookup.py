"""Draft tokens by lookup: a text goes on as it did after an earlier occurrence of its last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ov_phi3.backends.paged.drafter import HitRate
from ov_phi3.backends.paged.step_costs import DraftPlan, Offer, StepCosts
from ov_phi3.backends.paged.substitutions import Substitutions

__all__ = ["LookupDrafter"]

_NGRAM_SIZES = (8, 4, 2, 1)  # of the index, the longest first
_LONGEST = 32  # tokens of a match that are counted
# How often a prediction is taken to be right before anything is known of a text, by the length of its match, from so
# many tokens on, and by its kind. The outcomes correct these estimates.
_LENGTHS = (1, 2, 3, 4, 6, 9, 16)
# The n-gram occurred once; its last two occurrences went on alike, or not; a match that was interrupted.
_UNIQUE, _AGREED, _DISAGREED, _RESUMED = range(4)
_RATES = (
    (0.25, 0.5, 0.6, 0.7, 0.75, 0.85, 0.92),
    (0.35, 0.5, 0.6, 0.7, 0.75, 0.85, 0.92),
    (0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8),
    (0.6, 0.7, 0.7, 0.7, 0.8, 0.9, 0.9),
)
_LEAST_INTERRUPTED = 2  # tokens of a match that is taken up again behind what interrupted it
_MOST_INTERRUPTED = 4  # such matches that are remembered, the last ones
_LONGEST_GAP = 8  # tokens of the source that what interrupted it may replace
_SHORT = 4  # tokens of a match that says less than an interrupted one that can be taken up again
_LEAST_CHANCE = 0.03  # of all drafts together, down to which they are looked at


@dataclass(slots=True)
class _Match:
    """The earlier occurrence that is followed.

    Attributes:
        source: position of the token that is expected next; -1 for none.
        length: tokens in front of it that are also the last ones.
        kind: row of `_RATES`.
        interrupted: positions where matches ended, the last one first.
    """

    source: int = -1
    length: int = 0
    kind: int = _UNIQUE
    interrupted: tuple[int, ...] = ()


class LookupDrafter:
    """Guesses that the sequence goes on as it did after an earlier occurrence of its last tokens.

    Every n-gram of some sizes is indexed by its last position, so that a token takes constant time. A match is followed
    for as long as it predicts the right token, which makes it longer; the longer it is, the more often it is right.
    Where the text departs from its source, it often returns to it some tokens later, and departs in the same way again.

    Args:
        ids: the sequence so far.
        costs: what steps cost.
        number: how many tokens are drafted wherever there is a match; default: what is expected to be fastest.
        sizes: sizes of the n-grams, the longest first.

    Attributes:
        run: how many of its last predictions were right in a row, drafted or not.
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
        self._match = _Match()
        self._rates = [[HitRate(rate) for rate in rates] for rates in _RATES]
        self._substitutions = Substitutions()
        self._plan = DraftPlan()
        self.run = 0
        self._ahead: list[tuple[int, float]] = []  # predictions behind the last token, as far as they were needed
        self._start(ids)

    def _start(self, ids: Sequence[int]) -> None:
        """Index a prompt at once; its own repetitions say nothing about the reply."""
        self._ids = list(ids)
        for end in range(1, len(ids)):
            self._remember(end)
        self._find()
        self._remember(len(ids))

    def add(self, ids: Sequence[int]) -> None:
        """Note ids that the sequence has now: whether they were expected, and what may come next."""
        self._plan.earn(len(ids))
        self._ahead = []
        for token in ids:
            if self._match.source >= 0:
                self.run = self.run + 1 if token == self._guess()[0] else 0
                self._learn(token)
            self._move(token)
            self._remember(len(self._ids))

    def draft(self, most: int) -> list[int]:
        """The next tokens, at most `most` and possibly none."""
        if self._number is not None:
            return self.predicted(min(most, self._number)) if self._match.source >= 0 else []
        costs, plan = self._costs, self._plan
        if not plan.can_draft(costs, self.run):
            plan.take(1, 1.0)
            return []
        choice = plan.choose([Offer(costs, self.chances(min(most, costs.most_drafts)))], most, self.run)
        plan.take(choice.rows, choice.cost)
        return self.predicted(choice.rows - 1)

    def close(self) -> None:
        """Nothing: it holds only ids."""

    def chances(self, most: int) -> list[float]:
        """Of each prediction, at most so many, how likely it is right if those before it are; [] without a match.

        They end where the predictions are hardly ever right together.
        """
        return [chance for _, chance in self._look_ahead(most, _LEAST_CHANCE)]

    def predicted(self, count: int) -> list[int]:
        """The next tokens by the match that is followed; without one the last token, which fills the rows."""
        drafts = [token for token, _ in self._look_ahead(count)]
        return drafts + [(drafts or self._ids)[-1]] * (count - len(drafts))

    def _look_ahead(self, most: int, least_chance: float = 0.0) -> list[tuple[int, float]]:
        """Predictions with their chances, at most so many, as if each of them had come."""
        if len(self._ahead) >= most:
            return self._ahead[:most]
        known, match, together = len(self._ids), self._match, 1.0
        self._match, self._ahead = replace(match), []
        while len(self._ahead) < most and self._match.source >= 0:
            token, chance = self._guess()
            together *= chance
            if together < least_chance:
                break
            self._ahead.append((token, chance))
            self._move(token)
        del self._ids[known:]
        self._match = match
        return self._ahead

    def _guess(self) -> tuple[int, float]:
        """The next token by the match that is followed, and how likely it is right."""
        match, expected = self._match, self._ids[self._match.source]
        known = self._substitutions.guess(self._ids[-1], expected, match.length)
        return known or (expected, self._rates[match.kind][_LENGTH_CLASS[match.length]].rate)

    def _learn(self, token: int) -> None:
        """Note a token that came where the match predicts one."""
        match, expected = self._match, self._ids[self._match.source]
        everywhere = match.length >= _LEAST_INTERRUPTED or match.kind == _RESUMED
        if not self._substitutions.learn(self._ids[-1], expected, match.length, token, everywhere=everywhere):
            self._rates[match.kind][_LENGTH_CLASS[match.length]].note(token == expected)

    def _move(self, token: int) -> None:
        """Add a token, and follow the match past it, or another one."""
        match = self._match
        expected = self._ids[match.source] if match.source >= 0 else None
        self._ids.append(token)
        if token == expected:
            match.source += 1
            match.length = min(match.length + 1, _LONGEST)
            return
        was = match.source if match.length >= _LEAST_INTERRUPTED else -1
        if was >= 0:
            match.interrupted = (was, *match.interrupted[: _MOST_INTERRUPTED - 1])
        self._find()
        if match.length <= _SHORT and (resumed := self._resumed(was if match.length < 2 else -1)) >= 0:
            match.source, match.length, match.kind = resumed, 1, _RESUMED

    def _find(self) -> None:
        """Look for the last tokens at an earlier place, the longest n-gram first."""
        ids, match = self._ids, self._match
        match.source, match.length = -1, 0
        for size, index in self._index.items():
            source, before = index.get(hash(tuple(ids[-size:])), (-1, -1))
            length = self._common_end(source)
            if length >= size:  # otherwise there is none, or another n-gram with the same hash
                match.source, match.length = source, length
                agrees = before >= 0 and ids[before] == ids[source]
                match.kind = _UNIQUE if before < 0 else _AGREED if agrees else _DISAGREED
                return

    def _resumed(self, replaced: int) -> int:
        """Where an interrupted match goes on: behind the last token, else behind the token it replaced; -1 for nowhere.

        A record repeats the structure of the one before with other values, a quotation leaves words out.

        Args:
            replaced: position of the token that the last one replaced, which may be all that differs; -1 for none.
        """
        last = len(self._ids) - 1
        for start in self._match.interrupted:
            for at in range(start, min(start + _LONGEST_GAP, last)):
                if self._ids[at] == self._ids[last]:
                    return at + 1
        return replaced + 1 if 0 <= replaced < last - 1 else -1

    def _common_end(self, source: int) -> int:
        """Tokens in front of a position that are also the last ones."""
        ids, last, length = self._ids, len(self._ids), 0
        while length < min(source, _LONGEST) and ids[source - 1 - length] == ids[last - 1 - length]:
            length += 1
        return length

    def _remember(self, end: int) -> None:
        """Index the n-grams in front of a position; those of the last token after `_find`, which must not find them."""
        for size, index in self._index.items():
            if end >= size:
                key = hash(tuple(self._ids[end - size : end]))
                index[key] = (end, index[key][0] if key in index else -1)


_LENGTH_CLASS = tuple(
    max((at for at, least in enumerate(_LENGTHS) if matched >= least), default=0) for matched in range(_LONGEST + 1)
)
