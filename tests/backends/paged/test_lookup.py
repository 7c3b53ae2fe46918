"""Draft tokens by lookup, and how many: without a model."""

from __future__ import annotations

import random

import pytest
from drafting import time_with_drafts

from ov_phi3.backends.paged.lookup import LookupDrafter
from ov_phi3.backends.paged.step_costs import STEP_ROWS, DraftPlan, MeasuredCosts, Offer, StepCosts, best_rows

DEMO = StepCosts({1: 1.0, 2: 1.04, 3: 1.05, 4: 1.1, 6: 1.24, 8: 1.38, 12: 1.6, 16: 1.8}, change=0.55)
LARGE = StepCosts({1: 1.0, 2: 1.35, 3: 1.5, 4: 1.64, 6: 1.71, 8: 2.05, 12: 2.65, 16: 3.25})


def drafter(ids: list[int], costs: StepCosts = DEMO, number: int | None = None, sizes: int = 3) -> LookupDrafter:
    if number is None:
        return LookupDrafter(ids, costs)
    return LookupDrafter(ids, costs, number, range(sizes, 0, -1))


def time_of(prompt: list[int], reply: list[int], costs: StepCosts) -> float:
    """Time of a reply with drafts, in steps of one token per token, without its first token."""
    drafts = drafter([*prompt, reply[0]], costs)
    return time_with_drafts(drafts, reply, costs) / (len(reply) - 1)


def words(seed: int, count: int, kinds: int) -> list[int]:
    """Tokens with the frequencies of words: the n-th one is n times rarer than the first."""
    draw = random.Random(seed)
    return draw.choices(range(kinds), [1 / rank for rank in range(1, kinds + 1)], k=count)


class TestLookup:
    def test_goes_on_as_before(self) -> None:
        assert drafter([1, 2, 3, 4, 5, 9, 2, 3], number=3).draft(10) == [4, 5, 9]
        assert drafter([1, 2, 3, 4, 5, 9, 2, 3], number=3).draft(2) == [4, 5]
        assert drafter([1, 2, 3, 4, 5], number=3).draft(10) == []

    def test_of_several_occurrences_the_longest_match_counts(self) -> None:
        assert drafter([7, 1, 2, 3, 50, 8, 2, 3, 60, 7, 1, 2, 3], number=1, sizes=4).draft(9) == [50]
        assert drafter([7, 1, 2, 3, 50, 8, 2, 3, 60, 6, 2, 3], number=1).draft(9) == [60]

    def test_a_text_that_repeats_with_a_period_is_continued_past_its_end(self) -> None:
        assert drafter([1, 2, 3, 1, 2, 3, 1], number=8).draft(8) == [2, 3, 1, 2, 3, 1, 2, 3]

    def test_behind_a_replaced_token_a_long_match_goes_on(self) -> None:
        text = list(range(100, 130))
        lookup = drafter([*text, *text[:8]], StepCosts({rows: DEMO.of(rows) for rows in DEMO.rows}))
        lookup.add([5])  # in place of 108
        assert lookup.draft(4)[:2] == [109, 110]

    def test_added_one_by_one_or_together_the_drafts_are_the_same(self) -> None:
        text = words(3, 300, 20)
        together, single = drafter(text[:50]), drafter(text[:50])
        together.add(text[50:])
        for token in text[50:]:
            single.add([token])
        assert together.draft(15) == single.draft(15)

    def test_equals_a_search_through_the_whole_text(self) -> None:
        for seed in range(30):
            text = words(seed, 80, 12)
            lookup = drafter(text, number=1)
            expected: list[int] = []
            for size in (3, 2, 1):
                ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
                if ends and not expected:
                    expected = [text[ends[-1]]]
            assert lookup.draft(1) == expected


class TestNumber:
    def test_follows_from_chances_and_costs(self) -> None:
        assert best_rows(LARGE, [0.2] * 15) == (1, 1.0)
        assert best_rows(LARGE, [0.99] * 15) == (16, 3.25)
        assert 2 <= best_rows(LARGE, [0.6] * 15)[0] <= 6
        assert best_rows(LARGE, [0.99] * 15, credit=0.4) == (2, 1.35)
        assert best_rows(DEMO, []) == (1, 1.0)

    def test_a_change_of_rows_has_its_price(self) -> None:
        assert best_rows(DEMO, [0.2] * 15)[0] == 1
        assert best_rows(DEMO, [0.2] * 15, last=3) == (3, 1.05)
        entered, cost = best_rows(DEMO, [0.9] * 15)
        assert cost == pytest.approx(DEMO.of(entered) + 0.66)
        assert best_rows(DEMO, [0.9] * 15, last=entered) == (entered, DEMO.of(entered))

    def test_a_run_is_kept_up_for_a_while(self) -> None:
        text = list(range(100, 160))
        lookup = drafter([*text, *text[:20]])
        lookup.add(text[20:24])
        run = [len(lookup.draft(50))]
        assert run[0] > 0
        lookup.add(text[24 : 24 + run[0] + 1])
        for token in range(500, 530):  # nothing repeats any more
            run.append(len(lookup.draft(50)))
            lookup.add([token])
        assert run[2] == run[1] > 0  # filled up behind the last match
        assert run[-10:] == [0] * 10

    def test_a_record_repeats_the_structure_of_the_one_before(self) -> None:
        first, second = [[50, 1, 2, 3, 4, 5, value, 6, 7, 8, 9] for value in (30, 31)]
        lookup = drafter([*first, *second[:6]])
        lookup.add([31, 6])
        assert lookup.draft(3)[:3] in ([7, 8, 9], [])
        assert lookup.predicted(4) == [7, 8, 9, 50]

    def test_an_interrupted_match_counts_more_than_a_short_one(self) -> None:
        record = [50, 51, 10, 9, 5, 6, 60, 61, 11, 9, 5, 6, 70, 71]
        lookup = drafter([*record, 12, 13, 9, 1])
        lookup.add([50, 51, 12, 13, 9, 5])  # (9, 5) came last in front of 6 and 70
        assert lookup.predicted(3) == [6, 60, 61]

    @pytest.mark.parametrize("costs", [DEMO, LARGE], ids=["demo", "large"])
    def test_text_that_does_not_repeat_takes_hardly_longer(self, costs: StepCosts) -> None:
        """Also where short n-grams recur by chance, so that there is always something to draft."""
        for kinds in (5, 50, 1000):
            for seed in range(10):
                assert time_of(words(seed, 60, kinds), words(seed + 100, 100, kinds), costs) <= 1.02

    @pytest.mark.parametrize(("costs", "most"), [(DEMO, 0.4), (LARGE, 0.45)], ids=["demo", "large"])
    def test_text_that_repeats_its_prompt_is_faster(self, costs: StepCosts, most: float) -> None:
        prompt = words(1, 300, 2000)
        edited = [token if index % 40 else 2001 for index, token in enumerate(prompt[50:250])]
        assert time_of(prompt, edited, costs) < most

    @pytest.mark.parametrize(
        ("credit", "run", "drafts"),
        [(0.0, 2, False), (0.0, 3, True), (-0.8, 3, True), (-1.0, 3, False), (-1.4, 7, False), (-1.4, 8, True)],
    )
    def test_right_predictions_make_up_for_drafts_in_vain(self, credit: float, run: int, drafts: bool) -> None:
        plan = DraftPlan(credit)
        plan.earn(1)
        costs = StepCosts({1: 1.0, 4: 1.1}, change=0.5)
        assert plan.can_draft(costs, run) == drafts
        assert (plan.choose([Offer(costs, [0.95] * 3)], 50, run).rows > 1) == drafts

    def test_no_look_ahead_where_nothing_can_be_drafted(self) -> None:
        """It decides as with one."""
        for seed in range(20):
            prompt = words(seed, 120, 50)
            reply = prompt[30:90] + words(seed + 1, 60, 50)
            lookup, plan = drafter(prompt), DraftPlan()
            for token in reply:
                if not plan.can_draft(DEMO, lookup.run):
                    assert plan.choose([Offer(DEMO, lookup.chances(15))], 50, lookup.run).rows == 1
                choice = plan.choose([Offer(DEMO, lookup.chances(15))], 50, lookup.run)
                plan.take(choice.rows, choice.cost)
                plan.earn(1)
                lookup.add([token])

    def test_a_text_that_begins_to_repeat_is_noticed(self) -> None:
        prompt = words(1, 200, 2000)
        reply = words(2, 200, 2000) + prompt
        assert time_of(prompt, reply, LARGE) < 0.75


class Device:
    """Passes of these costs, in seconds, behind passes of another number of rows and with noise.

    Args:
        costs: of the passes.
        seconds: of a pass of one row.
        noise: of each pass, from this seed, as a share of its time; None for none.
        back: share of the cost of a change that a pass of one row has; the others have the rest of both.
    """

    def __init__(self, costs: StepCosts, seconds: float, noise: int | None = None, back: float = 1.0) -> None:
        self.costs, self.seconds, self.back = costs, seconds, back
        self.draw = None if noise is None else random.Random(noise)
        self.passes: list[int] = [1]

    def run(self, rows: int) -> float:
        change = self.costs.change * (self.back if rows == 1 else 2.0 - self.back)
        cost = self.costs.of(rows) + (change if rows != self.passes[-1] else 0.0)
        self.passes.append(rows)
        return self.seconds * cost * (1.0 if self.draw is None else self.draw.uniform(1.0, 1.6))


class TestMeasuredCosts:
    def test_are_the_shortest_times_and_never_fall(self) -> None:
        device = Device(StepCosts({**{rows: DEMO.of(rows) for rows in STEP_ROWS}, 8: 1.0}, DEMO.change), 0.02)
        costs = MeasuredCosts(device.run)
        assert costs.rows == STEP_ROWS
        assert costs.change == pytest.approx(DEMO.change, abs=0.02)
        assert costs.of(16) == pytest.approx(1.8, abs=0.02)
        assert costs.of(6) == pytest.approx(1.24, abs=0.02)
        assert costs.of(8) == costs.of(6)  # the measured time was less
        assert costs.of(5) == costs.of(6)
        assert costs.of(12) == pytest.approx(1.6, abs=0.02)
        assert costs.of(1) == 1.0
        assert MeasuredCosts(lambda rows: 0.01 if rows == 1 else 9.0).of(4) == 4.0  # as many steps of one row

    def test_one_that_cannot_pay_is_not_measured(self) -> None:
        device = Device(LARGE, 0.2)
        costs = MeasuredCosts(device.run)
        assert best_rows(costs, []) == (1, 1.0)
        assert best_rows(costs, [0.04] * 15) == (1, 1.0)
        assert device.passes == [1]
        assert best_rows(costs, [0.25] * 15) == (1, 1.0)
        assert device.passes == [1, 1, 1, 2, 1]  # three and more give 1.33 tokens at most, and cost more than two
        assert best_rows(costs, [0.99] * 15, credit=0.3) == (1, 1.0)
        assert len(device.passes) == 5
        assert best_rows(costs, [0.99] * 15)[0] == 16
        assert device.passes[5::2] == [3, 4, 6, 8, 12, 16]

    def test_a_change_may_cost_more_in_one_direction(self) -> None:
        costs = MeasuredCosts(Device(DEMO, 0.02, back=0.4).run)
        assert costs.change == pytest.approx(DEMO.change, abs=0.02)
        assert costs.of(8) == pytest.approx(DEMO.of(8), abs=0.02)

    def test_a_machine_that_becomes_faster_or_slower_changes_no_cost(self) -> None:
        device = Device(DEMO, 0.02)
        costs = MeasuredCosts(device.run)
        assert costs.seconds == 0.02
        for rows, seconds in ((4, 0.014), (8, 0.03)):
            device.seconds = seconds
            assert costs.of(rows) == pytest.approx(DEMO.of(rows), abs=0.02)

    def test_few_passes_for_each(self) -> None:
        device = Device(DEMO, 0.006)
        costs = MeasuredCosts(device.run)
        for rows in STEP_ROWS:
            costs.of(rows)
        assert len(device.passes) - 1 <= 5 * len(STEP_ROWS)

    def test_more_passes_where_times_differ(self) -> None:
        times = [0.02, 0.03, 0.009, 0.015, 0.0095]
        costs = MeasuredCosts(lambda _: times.pop(0))
        assert costs.seconds == 0.009
        assert times == []

    @pytest.mark.parametrize("table", [DEMO, LARGE], ids=["demo", "large"])
    def test_the_first_text_has_the_drafts_that_it_has_later(self, table: StepCosts) -> None:
        """Also where times are noise: what was not measured yet would not have changed a decision."""
        for seed in range(60):
            costs = MeasuredCosts(Device(table, 0.006, noise=seed).run)
            prompt = words(seed, 120, 30 if seed % 2 else 2000)
            reply = [token if index % 13 else 2001 for index, token in enumerate(prompt[20:])]
            runs = [drafts_of(prompt, reply, costs) for _ in range(2)]
            assert runs[0] == runs[1]

    def test_exact_times_decide_as_their_table(self) -> None:
        for seed in range(20):
            prompt = words(seed, 120, 50)
            reply = prompt[30:90] + words(seed + 1, 40, 50)
            table = {rows: round(32 * LARGE.of(rows)) / 32 for rows in STEP_ROWS}
            measured = MeasuredCosts(Device(LARGE, 0.06).run)
            assert drafts_of(prompt, reply, measured) == drafts_of(prompt, reply, StepCosts(table))


def drafts_of(prompt: list[int], reply: list[int], costs: StepCosts) -> list[list[int]]:
    """The drafts of each step of a reply."""
    lookup, drafts = drafter([*prompt, reply[0]], costs), []
    at = 1
    while at < len(reply):
        drafts.append(lookup.draft(len(reply) - at - 1))
        right = 0
        while right < len(drafts[-1]) and drafts[-1][right] == reply[at + right]:
            right += 1
        lookup.add(reply[at : at + right + 1])
        at += right + 1
    return drafts
