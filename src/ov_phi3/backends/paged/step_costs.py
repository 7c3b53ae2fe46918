"""What steps with drafts cost, and how many rows a step is to have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "STEP_ROWS",
    "Choice",
    "DraftPlan",
    "Offer",
    "StepCosts",
    "best_rows",
    "expected_tokens",
    "measure_step_costs",
]

STEP_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Rows of a step with drafts, the last known token included: few, since a CPU prepares kernels for each number."""

_MOST_ROUNDS, _MEASURED_SECONDS = 8, 1.0
_SAMPLES_OF_ONE = 4  # in a round: all other times are divided by that of one row

_MARGIN = 1.05  # drafts are made where a step with them is expected to be faster by this factor per token

# What drafts may cost: at first, and for each token, in steps; what they gain is added, up to a limit. So a text that
# does not repeat takes hardly longer, and one that begins to is drafted in earnest after a few right drafts.
_FIRST_CREDIT, _CREDIT_PER_TOKEN, _MOST_CREDIT = 0.3, 0.0075, 4.0
_CREDIT_OF_RUN = 1.6  # lent behind some right predictions in a row
_CHANGE_SHARE = 0.6  # drafts come in runs: a step pays this share of the two changes of rows that the run takes
_PATIENCE = 0.5  # a run is kept up without gain until it has lost this share of what the changes cost


class StepCosts:
    """What a step of several rows of one sequence costs, in steps of one row.

    Args:
        costs: cost by number of rows, behind a step of as many.
        change: what a step costs more behind a step of another number of rows. A CPU then prepares every node of the
            graph again, which on a small model takes as long as half a step.
        seconds: of a step of one row; 0 if unknown.
    """

    def __init__(self, costs: Mapping[int, float], change: float = 0.0, seconds: float = 0.0) -> None:
        self.costs = dict(sorted(costs.items()))
        self.rows = tuple(self.costs)
        self.change = change
        self.seconds = seconds

    @property
    def most_drafts(self) -> int:
        """Drafts of the largest step."""
        return self.rows[-1] - 1

    def of(self, rows: int) -> float:
        """What a step of this number of rows costs: as the next larger one that was measured."""
        return next((cost for number, cost in self.costs.items() if number >= rows), self.costs[self.rows[-1]])

    def with_passes(self, each: float) -> StepCosts:
        """The same with a pass of another model for every draft, each of which costs so many steps."""
        costs = {rows: cost + (rows - 1) * each for rows, cost in self.costs.items()}
        return StepCosts(costs, self.change, self.seconds)

    @classmethod
    def from_seconds(cls, seconds: Mapping[int, float], change: float = 0.0) -> StepCosts:
        """From measured times. They are rounded, and a step of more rows never costs less."""
        one = seconds[min(seconds)]
        costs: dict[int, float] = {}
        least = 1.0
        for rows in sorted(seconds):
            least = max(least, round(32 * seconds[rows] / one) / 32)
            costs[rows] = least
        return cls(costs, max(0.0, round(32 * change / one) / 32), one)


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


@dataclass(frozen=True, slots=True)
class Offer:
    """Drafts that one source can make.

    Attributes:
        costs: of steps with them.
        chances: see `expected_tokens`.
        setup: what they cost once more, before the first of them.
    """

    costs: StepCosts
    chances: Sequence[float]
    setup: float = 0.0


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

    def choose(self, offers: Sequence[Offer], most: int, confident: bool = False) -> Choice:
        """The rows of the next step, from the offer that gives the most tokens per time.

        Args:
            offers: what can be drafted. The first one can fill rows in which nothing is expected.
            most: most drafts that the sequence has room for.
            confident: the last predictions of the first offer were right, so that some credit is lent.
        """
        credit = self._earned + (_CREDIT_OF_RUN if confident else 0.0)
        best = Choice(0, 1, 1.0)
        for index, offer in enumerate(offers):
            rows, cost = best_rows(offer.costs, offer.chances, credit - offer.setup, self.rows)
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
