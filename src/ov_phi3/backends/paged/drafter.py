"""Draft tokens: guesses of the next tokens of a sequence, which one step of the model checks together.

A step computes the logits of the last token and of all draft tokens. The reply takes the tokens that it chooses from
these logits up to the first one that differs from its draft, so that drafts change the number of steps and not the
reply. A drafter knows nothing of logits or sampling.

How many tokens are drafted follows from the sequence's own ids and from a table of what steps cost, which is fixed: a
prompt has the same drafts every time, whatever else runs. The drafter predicts every token, also those that it does not
draft, and counts how often it was right. Text that does not repeat costs no pass to find out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

__all__ = ["STEP_ROWS", "Drafter", "LookupDrafter", "StepCosts", "best_rows", "expected_tokens", "measure_step_costs"]

STEP_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Rows of a step with drafts, the last known token included: few, since a CPU prepares kernels for each number."""

_MOST_ROUNDS, _MEASURED_SECONDS = 8, 1.0
_SAMPLES_OF_ONE = 4  # in a round: all other times are divided by that of one row

_NGRAM_SIZES = (8, 4, 2, 1)  # of the index, the longest first
_LONGEST = 32  # tokens of a match that are counted
_MARGIN = 1.05  # drafts are made where a step with them is expected to be faster by this factor per token
_SLOWEST_WEIGHT = 0.06  # of the newest outcome in a moving average
_PRIOR_OUTCOMES = 3  # how many outcomes the first estimate counts for
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

# What drafts may cost: at first, and for each token, in steps; what they gain is added, up to a limit. So a text that
# does not repeat takes hardly longer, and one that begins to is drafted in earnest after a few right drafts.
_FIRST_CREDIT, _CREDIT_PER_TOKEN, _MOST_CREDIT = 0.3, 0.0075, 4.0
_RUN, _CREDIT_OF_RUN = 3, 1.6  # after so many right predictions in a row, so much is lent
_CHANGE_SHARE = 0.6  # drafts come in runs: a step pays this share of the two changes of rows that the run takes
_PATIENCE = 0.5  # a run is kept up without gain until it has lost this share of what the changes cost


class StepCosts:
    """What a step of several rows of one sequence costs, in steps of one row.

    Args:
        costs: cost by number of rows, behind a step of as many.
        change: what a step costs more behind a step of another number of rows. A CPU then prepares every node of the
            graph again, which on a small model takes as long as half a step.
    """

    def __init__(self, costs: Mapping[int, float], change: float = 0.0) -> None:
        self.costs = dict(sorted(costs.items()))
        self.rows = tuple(self.costs)
        self.change = change

    def of(self, rows: int) -> float:
        """What a step of this number of rows costs: as the next larger one that was measured."""
        return next((cost for number, cost in self.costs.items() if number >= rows), self.costs[self.rows[-1]])

    @classmethod
    def from_seconds(cls, seconds: Mapping[int, float], change: float = 0.0) -> StepCosts:
        """From measured times. They are rounded, and a step of more rows never costs less."""
        one = seconds[min(seconds)]
        costs: dict[int, float] = {}
        least = 1.0
        for rows in sorted(seconds):
            least = max(least, round(32 * seconds[rows] / one) / 32)
            costs[rows] = least
        return cls(costs, max(0.0, round(32 * change / one) / 32))


def measure_step_costs(seconds_of: Callable[[int], float]) -> StepCosts:
    """Measure what steps cost: the shortest of some rounds, since anything else in the machine only adds to a time.

    Args:
        seconds_of: runs a step of a number of rows and returns its time.
    """
    best = dict.fromkeys(STEP_ROWS, math.inf)
    back = dict.fromkeys(STEP_ROWS[1:], math.inf)  # of one row behind several
    began, rounds = time.perf_counter(), 0
    while rounds < _MOST_ROUNDS and (not rounds or time.perf_counter() - began < _MEASURED_SECONDS):
        for rows in STEP_ROWS:
            seconds_of(rows)  # the first of a number of rows changes over to it, and the very first prepares kernels
            for _ in range(_SAMPLES_OF_ONE if rows == 1 else 1):
                best[rows] = min(best[rows], seconds_of(rows))
            if rows > 1:
                back[rows] = min(back[rows], seconds_of(1))
        rounds += 1
    changes = sorted(seconds - best[1] for seconds in back.values())
    return StepCosts.from_seconds(best, changes[len(changes) // 2])


def expected_tokens(costs: StepCosts, chances: Sequence[float]) -> dict[int, float]:
    """How many tokens a step is expected to give, by its rows, as far as there are chances.

    Args:
        costs: see `StepCosts`.
        chances: of each draft, how likely it is right if those before it are.
    """
    expected, all_right, used = 1.0, 1.0, 0
    tokens: dict[int, float] = {}
    for rows in costs.rows:
        if rows - 1 > len(chances):
            break
        for chance in chances[used : rows - 1]:
            all_right *= chance
            expected += all_right
        used = rows - 1
        tokens[rows] = expected
    return tokens


def best_rows(costs: StepCosts, chances: Sequence[float], credit: float = math.inf, last: int = 1) -> tuple[int, float]:
    """The number of rows that gives the most tokens per time, and its cost; 1 if no draft is worth its cost.

    Args:
        costs: see `StepCosts`.
        chances: see `expected_tokens`.
        credit: most that a step may cost more than one without drafts.
        last: rows of the step before. Coming back to one row costs nothing, as it is paid for at the start of a run.
    """
    best, best_cost, best_rate = 1, 1.0, _MARGIN if last == 1 else 1.0
    for rows, expected in expected_tokens(costs, chances).items():
        if rows == 1:
            continue
        change = 0.0 if rows == last else costs.change * (2.0 * _CHANGE_SHARE if last == 1 else 1.0)
        cost = costs.of(rows) + change
        if cost - 1.0 <= credit and expected / cost > best_rate:
            best, best_cost, best_rate = rows, cost, expected / cost
    return best, best_cost


class Drafter(Protocol):
    """Guesses the next tokens of one sequence."""

    def add(self, ids: Sequence[int]) -> None:
        """Note ids that the sequence has now."""
        ...

    def draft(self, most: int) -> list[int]:
        """The next tokens, at most `most` and possibly none."""
        ...


class LookupDrafter:
    """Guesses that the sequence goes on as it did after an earlier occurrence of its last tokens.

    Every n-gram of some sizes is indexed by its last position, so that a token takes constant time. A match is followed
    for as long as it predicts the right token, which makes it longer; the longer it is, the more often it is right.

    Args:
        ids: the sequence so far.
        costs: what steps cost; asked for at the first draft.
        number: how many tokens are drafted wherever there is a match; default: what is expected to be fastest.
        sizes: sizes of the n-grams, the longest first.
    """

    def __init__(
        self,
        ids: Sequence[int],
        costs: Callable[[], StepCosts],
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
        self._rates = [list(rates) for rates in _RATES]
        self._outcomes = [[_PRIOR_OUTCOMES] * len(_LENGTHS) for _ in _RATES]
        self._credit = _FIRST_CREDIT
        self._run = 0  # right predictions in a row
        self._rows = 1  # of the last step
        self._lost = 0.0  # by keeping up the number of rows without gain
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
        self._credit += len(ids) * (1.0 + _CREDIT_PER_TOKEN)
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
            return self._predicted(min(most, self._number)) if self._source >= 0 else []
        costs = self._costs()  # measured at the first step, whether there is something to draft or not
        ahead = range(min(most, costs.rows[-1] - 1) if self._source >= 0 else 0)
        rates = self._rates[self._kind]
        chances = [rates[_LENGTH_CLASS[min(self._matched + i, _LONGEST)]] for i in ahead]
        earned = min(self._credit, _MOST_CREDIT) - 1.0  # without the token that a step gives in any case
        credit = earned + (_CREDIT_OF_RUN if self._run >= _RUN else 0.0)
        rows, cost = best_rows(costs, chances, credit, self._rows)
        if rows > 1:
            self._lost = 0.0
        elif most >= self._rows - 1 and self._keeps_up(costs, chances, credit):
            rows, cost = self._rows, costs.of(self._rows)
        self._rows = rows
        self._credit = earned + 1.0 - cost
        return self._predicted(rows - 1)

    def _keeps_up(self, costs: StepCosts, chances: Sequence[float], credit: float) -> bool:
        """Whether a run of steps with several rows goes on although this step gains nothing by it.

        Its end and the next start cost two changes. What has been lost since the last gain must not come near to that.
        """
        if self._rows == 1:
            return False
        cost = costs.of(self._rows)
        expected = list(expected_tokens(costs, chances[: self._rows - 1]).values())[-1]
        self._lost += max(0.0, cost - expected)
        return self._lost <= _PATIENCE * 2.0 * costs.change and cost - 1.0 <= credit

    def _predicted(self, count: int) -> list[int]:
        """The next tokens by the match that is followed; without one the last token, which fills the rows."""
        known, source = len(self._ids), self._source
        if source < 0:
            return [self._ids[-1]] * count
        drafts: list[int] = []
        for at in range(source, source + count):  # past its own end the text repeats with the period of the match
            drafts.append(self._ids[at] if at < known else drafts[at - known])
        return drafts

    def _learn(self, right: bool) -> None:
        kind, length = self._kind, _LENGTH_CLASS[self._matched]
        self._outcomes[kind][length] += 1
        weight = max(_SLOWEST_WEIGHT, 1.0 / self._outcomes[kind][length])
        self._rates[kind][length] += weight * (right - self._rates[kind][length])

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
