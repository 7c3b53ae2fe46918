"""What steps with drafts cost, and how many rows a step is to have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "STEP_ROWS",
    "Choice",
    "DraftPlan",
    "MeasuredCosts",
    "Offer",
    "StepCosts",
    "best_rows",
    "expected_tokens",
]

STEP_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Rows of a step with drafts, the last known token included: few, since a CPU prepares kernels for each number."""

# A time is known when the two shortest samples agree so far, or after so many of them, or so many seconds.
_AGREEMENT, _MOST_SAMPLES, _MOST_SECONDS = 1.1, 8, 0.2
_LONG_SECONDS = 0.05  # of a step whose change to another number of rows, some milliseconds, hardly counts

_MARGIN = 1.05  # drafts are made where a step with them is expected to be faster by this factor per token

# What drafts may cost: at first, and for each token, in steps; what they gain is added, up to a limit. So a text that
# does not repeat takes hardly longer, and one that begins to is drafted in earnest after a few right drafts.
_FIRST_CREDIT, _CREDIT_PER_TOKEN, _MOST_CREDIT = 0.15, 0.0075, 4.0
# Lent behind so many right predictions in a row, drafted or not, to a text that has lost no more than this.
_LOANS = ((3, 1.6, 0.9), (8, 4.0, math.inf))
_CHANGE_SHARE = 0.6  # drafts come in runs: a step pays this share of the two changes of rows that the run takes
_PATIENCE = 0.5  # a run is kept up without gain until it has lost this share of what the changes cost


class StepCosts:
    """What a step of several rows of one sequence costs, in steps of one row.

    Args:
        costs: cost by number of rows, behind a step of as many; more rows never cost less.
        change: what a step costs more behind a step of another number of rows. A CPU then prepares every node of the
            graph again, which on a small model takes as long as half a step.
        seconds: of a step of one row; 0 if unknown.

    Attributes:
        rows: the numbers of rows that a step can have, the smallest first.
    """

    def __init__(self, costs: Mapping[int, float], change: float = 0.0, seconds: float = 0.0) -> None:
        self._costs = dict(costs)
        self._change, self._seconds = change, seconds
        self.rows: tuple[int, ...] = tuple(sorted(costs))

    @property
    def change(self) -> float:
        """What a step costs more behind a step of another number of rows."""
        return self._change

    @property
    def seconds(self) -> float:
        """Of a step of one row; 0 if unknown."""
        return self._seconds

    @property
    def most_drafts(self) -> int:
        """Drafts of the largest step."""
        return self.rows[-1] - 1

    def of(self, rows: int) -> float:
        """What a step of this number of rows costs: as one of the next larger number in `rows`."""
        return self._cost(next((number for number in self.rows if number >= rows), self.rows[-1]))

    def at_least(self, rows: int) -> float:
        """A lower bound of `of`, for which nothing is measured."""
        return max(cost for number, cost in self._costs.items() if number <= rows)

    @property
    def least_entry(self) -> float:
        """A lower bound of what the first step with drafts costs more than one without."""
        return self.at_least(2) - 1.0 + 2.0 * _CHANGE_SHARE * self._change

    def _cost(self, number: int) -> float:
        return self._costs[number]


class MeasuredCosts(StepCosts):
    """Costs that are measured one by one, each when a decision depends on it, and are fixed from then on.

    A step that cannot be worth more drafts whatever they cost needs no measurement, and decides as it would with one:
    so the drafts of a prompt are the same the first time as later, and a short reply does not pay for a whole table.

    Args:
        seconds_of: runs a step of a number of rows and returns its time.
    """

    def __init__(self, seconds_of: Callable[[int], float]) -> None:
        super().__init__({1: 1.0})
        self._seconds_of = seconds_of
        self.rows = STEP_ROWS

    @property
    def seconds(self) -> float:
        """Of a step of one row."""
        if not self._seconds:
            self._seconds = self._shortest(1, least=2)  # the very first prepares kernels
        return self._seconds

    @property
    def change(self) -> float:
        """What a step costs more behind a step of another number of rows; measured with the first cost."""
        if len(self._costs) == 1:
            self._cost(self.rows[1])
        return self._change

    def _cost(self, number: int) -> float:
        if number not in self._costs:
            is_long, measures_change = self.seconds >= _LONG_SECONDS, len(self._costs) == 1
            seconds, changed = self._shortest(number), None
            if not is_long and measures_change:
                changed = self._changed(number)
            elif not is_long:
                self._seconds_of(1)  # behind another number of rows, so not the time of a step of one row
            one = self._one_now()
            measured = min(_rounded(seconds / one), float(number))  # it is worth as many steps at most
            larger = (cost for rows, cost in self._costs.items() if rows > number)
            self._costs[number] = max(self.at_least(number), min([measured, *larger]))
            if changed is not None:
                self._change = max(0.0, _rounded((changed - seconds - one) / (2.0 * one)))
        return self._costs[number]

    def _shortest(self, rows: int, least: int = 1) -> float:
        """The shortest of some times, since anything else in the machine only adds to a time."""
        times: list[float] = []
        while len(times) < least or not _is_known(times):
            times.append(self._seconds_of(rows))
        return min(times)

    def _one_now(self) -> float:
        """A step of one row again, since the machine may have become faster or slower: it shares its memory."""
        time = self._seconds_of(1)
        return time if 1.0 / _AGREEMENT < time / self.seconds < _AGREEMENT else self._shortest(1)

    def _changed(self, rows: int) -> float:
        """The times of a step of several rows behind one of one row and of one behind several, together.

        The last step was one of these rows.
        """
        back, there = [self._seconds_of(1)], [math.inf]
        while not _is_known(back):
            there.append(self._seconds_of(rows))
            back.append(self._seconds_of(1))
        return min(there) + min(back)


def _rounded(cost: float) -> float:
    return round(32 * cost) / 32


def _is_known(times: Sequence[float]) -> bool:
    shortest = sorted(times)[:2]
    agree = len(shortest) == 2 and shortest[1] < _AGREEMENT * shortest[0]
    return agree or len(times) >= _MOST_SAMPLES or sum(times) > _MOST_SECONDS


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


def best_rows(
    costs: StepCosts, chances: Sequence[float], credit: float = math.inf, last: int = 1, each: float = 0.0
) -> tuple[int, float]:
    """The number of rows that gives the most tokens per time, and its cost; 1 if no draft is worth its cost.

    It asks for a cost only if the cost decides: where the lower bound is too much already, the cost is too.

    Args:
        costs: see `StepCosts`.
        chances: see `expected_tokens`.
        credit: most that a step may cost more than one without drafts.
        last: rows of the step before. Coming back to one row costs nothing, as it is paid for at the start of a run.
        each: what every draft costs beside its row.
    """
    best, best_cost, best_rate = 1, 1.0, _MARGIN if last == 1 else 1.0
    for rows, expected in expected_tokens(costs, chances).items():
        passes = (rows - 1) * each
        least = costs.at_least(rows) + passes
        if rows == 1 or least - 1.0 > credit or expected / least <= best_rate:
            continue
        cost = costs.of(rows) + passes
        if rows != last and cost - 1.0 <= credit and expected / cost > best_rate:
            cost += costs.change * (2.0 * _CHANGE_SHARE if last == 1 else 1.0)
        if cost - 1.0 <= credit and expected / cost > best_rate:
            best, best_cost, best_rate = rows, cost, expected / cost
    return best, best_cost


@dataclass(frozen=True, slots=True)
class Offer:
    """Drafts that one source can make.

    Attributes:
        costs: of steps with them.
        chances: see `expected_tokens`.
        setup: what they cost once more, before the first of them.
        each: what every draft costs beside its row: a pass of another model.
    """

    costs: StepCosts
    chances: Sequence[float]
    setup: float = 0.0
    each: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What the next step computes.

    Attributes:
        offer: index of the offer whose drafts it computes.
        rows: its rows; 1 without drafts.
        cost: what it is expected to cost, in steps of one row.
        expected: how many tokens it is expected to give.
    """

    offer: int
    rows: int
    cost: float
    expected: float = 1.0


class DraftPlan:
    """How many rows the steps of one sequence have, and what drafts may cost.

    Args:
        credit: steps that drafts may cost in vain at first.
        credit_per_token: steps that they may cost in vain for each token of the reply.
    """

    def __init__(self, credit: float = _FIRST_CREDIT, credit_per_token: float = _CREDIT_PER_TOKEN) -> None:
        self._credit = credit
        self._per_token = credit_per_token
        self.rows = 1  # of the last step
        self._lost = 0.0  # by keeping up the number of rows without gain

    def earn(self, tokens: int) -> None:
        """Note how many tokens the sequence has more."""
        self._credit += tokens * (1.0 + self._per_token)

    @property
    def _earned(self) -> float:
        return min(self._credit, _MOST_CREDIT) - 1.0  # without the token that a step gives in any case

    def _credit_in(self, run: int) -> float:
        earned = self._earned
        return earned + max((loan for least, loan, most in _LOANS if run >= least and earned >= -most), default=0.0)

    def can_draft(self, costs: StepCosts, run: int) -> bool:
        """Whether `choose` might choose drafts, whatever their chances are; its answer is 1 row otherwise."""
        return self.rows > 1 or self._credit_in(run) >= costs.least_entry

    def choose(self, offers: Sequence[Offer], most: int, run: int = 0) -> Choice:
        """The rows of the next step, from the offer that gives the most tokens per time.

        Args:
            offers: what can be drafted. The first one can fill rows in which nothing is expected.
            most: most drafts that the sequence has room for.
            run: how many of the last predictions of the first offer were right in a row; some credit is lent for it.
        """
        credit = self._credit_in(run)
        best = Choice(0, 1, 1.0)
        for index, offer in enumerate(offers):
            rows, cost = best_rows(offer.costs, offer.chances, credit - offer.setup, self.rows, offer.each)
            expected = expected_tokens(offer.costs, offer.chances)[rows]
            if rows > 1 and expected / cost > best.expected / best.cost:
                best = Choice(index, rows, cost + offer.setup, expected)
        if best.rows == 1 and most >= self.rows - 1 and self._keeps_up(offers[0], credit):
            return Choice(0, self.rows, offers[0].costs.of(self.rows))
        if best.rows > 1:
            self._lost = 0.0
        return best

    def take(self, rows: int, cost: float) -> None:
        """Note the rows that the next step has, and what it costs."""
        self._credit = self._earned + 1.0 - cost
        self.rows = rows

    def _keeps_up(self, offer: Offer, credit: float) -> bool:
        """Whether a run of steps with several rows goes on although this step gains nothing by it.

        Its end and the next start cost two changes. What has been lost since the last gain must not come near to that.
        """
        if self.rows == 1:
            return False
        cost = offer.costs.of(self.rows)
        expected = list(expected_tokens(offer.costs, offer.chances[: self.rows - 1]).values())[-1]
        self._lost += max(0.0, cost - expected)
        return self._lost <= _PATIENCE * 2.0 * offer.costs.change and cost - 1.0 <= credit
