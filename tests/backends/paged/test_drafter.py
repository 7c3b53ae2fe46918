"""Draft tokens by lookup, and how many: without a model."""

from __future__ import annotations

import random

import pytest
from drafting import time_with_drafts

from ov_phi3.backends.paged.drafter import LookupDrafter
from ov_phi3.backends.paged.step_costs import STEP_ROWS, StepCosts, best_rows, measure_step_costs

DEMO = StepCosts({1: 1.0, 2: 1.04, 3: 1.05, 4: 1.1, 6: 1.24, 8: 1.38, 12: 1.6, 16: 1.8}, change=0.55)
LARGE = StepCosts({1: 1.0, 2: 1.35, 3: 1.5, 4: 1.64, 6: 1.71, 8: 2.05, 12: 2.65, 16: 3.25})


def drafter(ids: list[int], costs: StepCosts = DEMO, number: int | None = None, sizes: int = 3) -> LookupDrafter:
    if number is None:
        return LookupDrafter(ids, lambda: costs)
    return LookupDrafter(ids, lambda: costs, number, range(sizes, 0, -1))


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
        lookup = drafter([*text, *text[:8]], StepCosts(DEMO.costs))
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
        assert lookup._source == 8

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

    def test_a_text_that_begins_to_repeat_is_noticed(self) -> None:
        prompt = words(1, 200, 2000)
        reply = words(2, 200, 2000) + prompt
        assert time_of(prompt, reply, LARGE) < 0.75


def test_costs_are_the_shortest_times_and_never_fall() -> None:
    times = {rows: 0.02 * DEMO.of(rows) for rows in STEP_ROWS}
    calls: list[int] = [0]

    def seconds_of(rows: int) -> float:
        calls.append(rows)
        changed = rows != calls[-2]
        noise = 0.1 if len(calls) % 17 == 3 else 0.0
        return times[rows] + (0.02 * DEMO.change if changed else 0.0) + noise - (0.008 if rows == 8 else 0)

    costs = measure_step_costs(seconds_of)
    assert costs.rows == STEP_ROWS
    assert costs.of(1) == 1.0
    assert costs.change == pytest.approx(DEMO.change, abs=0.02)
    assert costs.of(8) == costs.of(6)  # the measured time was less
    assert costs.of(5) == costs.of(6)
    assert costs.of(16) == pytest.approx(1.8, abs=0.02)
