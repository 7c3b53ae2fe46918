"""How many tokens a draft model drafts: without a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import cast

import pytest
from drafting import time_with_drafts

from ov_phi3.backends.paged.draft_model import DraftModel, DraftSequence, ModelDrafter
from ov_phi3.backends.paged.lookup import LookupDrafter
from ov_phi3.backends.paged.step_costs import StepCosts

LARGE = StepCosts({1: 1.0, 2: 1.35, 3: 1.5, 4: 1.64, 6: 1.71, 8: 2.05, 12: 2.65, 16: 3.25}, seconds=0.1)
SMALL = StepCosts({rows: 0.95 + 0.05 * rows for rows in LARGE.rows}, change=0.5, seconds=0.004)


class Scripted:
    """A sequence of a draft model that is right with some probability, and a model whose passes cost something."""

    def __init__(self, reply: list[int], right: float, each: float, confident: bool) -> None:
        self.reply, self.right, self.each, self.confident = reply, right, each, confident
        self.at, self.passes = 0, 0
        self.draw = random.Random(1)
        self.lag = 1
        self.costs = StepCosts({1: 1.0, 16: 2.0})

    def pass_cost(self, _: StepCosts) -> float:
        return self.each

    def room(self, most: int) -> int:
        return most

    def add(self, _: int) -> None:
        self.at += 1

    def draft(self, count: int, proceed: Callable[[float], bool] = lambda _: True) -> list[int]:
        drafts: list[int] = []
        while len(drafts) < count:
            is_right = self.draw.random() < self.right
            at = self.at + len(drafts)
            drafts.append(self.reply[at] if is_right and at < len(self.reply) else -1)
            self.passes += 1
            if not proceed((0.97 if is_right else 0.4) if self.confident else 0.8):
                break
        return drafts


def time_of(
    right: float, each: float, costs: StepCosts = LARGE, *, confident: bool = False, alone: bool = True, lag: int = 1
) -> float:
    """Time of a reply of 200 tokens, in steps of one token per token."""
    reply = random.Random(2).sample(range(100, 5000), 200)
    stub = Scripted(reply, right, each, confident)
    stub.lag = lag
    drafter = ModelDrafter(
        cast("DraftSequence", stub), LookupDrafter([], costs), cast("DraftModel", stub), costs,
        lambda: alone,
    )  # fmt: skip
    drafter.add(reply[:1])
    time = time_with_drafts(drafter, reply, costs)
    return (time + stub.passes * each) / (len(reply) - 1)


class TestNumber:
    def test_follows_from_chances_and_costs(self) -> None:
        assert time_of(0.95, 0.05) < 0.5
        assert time_of(0.7, 0.05) < 0.75
        assert time_of(0.95, 0.05, SMALL) < 0.45
        assert time_of(0.95, 0.9) < 1.06  # a pass costs as much as a step

    @pytest.mark.parametrize("costs", [LARGE, SMALL], ids=["large", "small"])
    def test_wrong_drafts_cost_little(self, costs: StepCosts) -> None:
        for right in (0.0, 0.1, 0.3):
            assert time_of(right, 0.1, costs) < 1.05

    def test_right_drafts_lead_to_more(self) -> None:
        assert time_of(0.98, 0.05, SMALL) < 0.25
        assert time_of(0.98, 0.2) < 0.6

    def test_unlikely_drafts_end_the_passes(self) -> None:
        assert time_of(0.7, 0.1, confident=True) < time_of(0.7, 0.1)

    def test_none_where_too_much_has_to_be_computed_before(self) -> None:
        assert time_of(0.95, 0.05, lag=3000) == 1.0

    def test_none_where_others_run(self) -> None:
        assert time_of(0.95, 0.05, alone=False) == 1.0
