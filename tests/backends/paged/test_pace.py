"""The prefill budget of a step that also decodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3.backends.paged.model_runner import ScheduledTokens
from ov_phi3.backends.paged.pace import Pace
from ov_phi3.backends.paged.sequence import Sequence


def parts(*counts: int) -> list[ScheduledTokens]:
    """A step: one token is a decode, more are prefill."""
    return [ScheduledTokens(Sequence(np.arange(count)), count, ()) for count in counts]


def paced(**milliseconds: float) -> Pace:
    """A pace that knows the time of a decode, 10 ms, and of changed passes: `t32=20` for 32 tokens."""
    pace = Pace()
    for _ in range(2):  # the first pass of a size says nothing
        for name, time in milliseconds.items():
            pace.note(parts(int(name[1:])), time / 1000)
            pace.note(parts(1), 0.015)
            pace.note(parts(1), 0.010)
    return pace


def test_a_step_takes_at_most_two_and_a_half_times_as_long() -> None:
    assert paced(t32=25).prefill_budget() == 31


def test_between_two_known_times_the_budget_is_in_proportion() -> None:
    assert paced(t32=20, t64=30).prefill_budget() == 47


def test_beyond_the_known_times_the_budget_grows_in_proportion() -> None:
    """The time for more tokens is overestimated, as a pass has a part that does not grow; the next ones correct it."""
    assert paced(t32=20).prefill_budget() == 39


def test_before_the_times_are_known_the_budget_is_small() -> None:
    pace = Pace()
    assert pace.prefill_budget() == 16
    pace.note(parts(1), 0.010)
    pace.note(parts(1), 0.010)
    assert pace.prefill_budget() == 16


def test_the_first_pass_of_a_size_compiles_kernels_and_says_nothing() -> None:
    pace = paced(t32=20)
    pace.note(parts(40), 0.900)
    assert pace.prefill_budget() == 39
    pace.note(parts(1), 0.010)
    pace.note(parts(40), 0.021)
    assert pace.prefill_budget() > 40


def test_a_pass_as_long_as_the_one_before_is_no_measure_of_a_change() -> None:
    pace = paced(t32=25)
    pace.note(parts(32), 0.025)
    for _ in range(20):
        pace.note(parts(32), 0.012)
    assert pace.prefill_budget() == 31


def test_a_high_time_is_soon_corrected() -> None:
    pace = paced(t16=60, t32=600)
    assert pace.prefill_budget() == 8
    for _ in range(5):
        pace.note(parts(1, 15), 0.020)
        pace.note(parts(1), 0.010)
    assert 15 <= pace.prefill_budget() <= 31


@pytest.mark.parametrize("seconds", [0.0, 1e-300])
def test_steps_without_a_measurable_time(seconds: float) -> None:
    assert paced(t32=1000 * seconds).prefill_budget() == 2047  # and a decode


@given(st.lists(st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 10)), max_size=20))
def test_there_is_always_a_budget(steps: list[tuple[list[int], float]]) -> None:
    pace = Pace()
    for counts, seconds in steps:
        pace.note(parts(*counts), seconds)
        assert 8 <= pace.prefill_budget() <= 2048


@pytest.mark.parametrize(
    ("decoding", "prefilling", "budget"),
    [(1, 1, 31), (4, 4, 28), (1, 3, 63), (2, 6, 62), (1, 40, 127), (0, 1, 31)],
)
def test_more_requests_that_wait_for_a_first_token_get_longer_steps(
    decoding: int, prefilling: int, budget: int
) -> None:
    pace = paced(t32=25, t64=40, t128=60)
    assert pace.prefill_budget(decoding, prefilling) == budget


def test_replies_that_nobody_reads_along_wait_for_longer_steps() -> None:
    pace = paced(t32=25, t64=40, t128=60)
    assert pace.prefill_budget(1, 1, streamed=False) == 128 * 160 // 60 - 1
    assert pace.prefill_budget(1, 40, streamed=True) == 127
