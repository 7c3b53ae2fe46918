"""Draft tokens by lookup, and how many: without a model."""

from __future__ import annotations

import random

import pytest

from ov_phi3.backends.paged.drafter import STEP_ROWS, LookupDrafter, StepCosts, best_number, measure_step_costs

DEMO = StepCosts({1: 1.0, 2: 1.0, 3: 1.03, 4: 1.06, 6: 1.21, 8: 1.28, 12: 1.5, 16: 1.75})
LARGE = StepCosts({1: 1.0, 2: 1.35, 3: 1.5, 4: 1.64, 6: 1.71, 8: 2.05, 12: 2.65, 16: 3.25})


def drafter(ids: list[int], costs: StepCosts = DEMO, number: int | None = None, sizes: int = 3) -> LookupDrafter:
    if number is None:
        return LookupDrafter(ids, lambda: costs)
    return LookupDrafter(ids, lambda: costs, number, range(sizes, 0, -1))


def time_of(prompt: list[int], reply: list[int], costs: StepCosts) -> float:
    """Time of a reply with drafts, in steps of one token per token, without its first token."""
    draft = drafter([*prompt, reply[0]], costs)
    at, time = 1, 0.0
    while at < len(reply):
        drafts = draft.draft(len(reply) - at - 1)
        time += costs.of(1 + len(drafts))
        right = 0
        while right < len(drafts) and drafts[right] == reply[at + right]:
            right += 1
        draft.add(reply[at : at + right + 1])
        at += right + 1
    return time / (len(reply) - 1)


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
        lookup = drafter([*text, *text[:8]])
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
        assert best_number(DEMO, [0.2] * 15) == 2
        assert best_number(LARGE, [0.2] * 15) == 0
        assert best_number(LARGE, [0.99] * 15) == 15
        assert 1 <= best_number(LARGE, [0.6] * 15) <= 5
        assert best_number(LARGE, [0.99] * 15, credit=0.4) == 1
        assert best_number(DEMO, []) == 0

    @pytest.mark.parametrize("costs", [DEMO, LARGE], ids=["demo", "large"])
    def test_text_that_does_not_repeat_takes_hardly_longer(self, costs: StepCosts) -> None:
        """Also where short n-grams recur by chance, so that there is always something to draft."""
        for kinds in (5, 50, 1000):
            for seed in range(10):
                assert time_of(words(seed, 60, kinds), words(seed + 100, 100, kinds), costs) <= 1.02

    @pytest.mark.parametrize(("costs", "most"), [(DEMO, 0.3), (LARGE, 0.45)], ids=["demo", "large"])
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
    calls: dict[int, int] = {}

    def seconds_of(rows: int) -> float:
        calls[rows] = calls.get(rows, 0) + 1
        return times[rows] * (10 if calls[rows] == 2 else 1) - (0.005 if rows == 8 else 0)

    costs = measure_step_costs(seconds_of)
    assert costs.rows == STEP_ROWS
    assert costs.of(1) == 1.0
    assert costs.of(8) == costs.of(6)  # the measured time was less
    assert costs.of(5) == costs.of(6)
    assert costs.of(16) == pytest.approx(1.75, abs=0.02)
