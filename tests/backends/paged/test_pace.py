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


def test_a_step_takes_at_most_twice_as_long() -> None:
    pace = Pace()
    pace.note(parts(1, 1), 0.010)
    pace.note(parts(1, 1, 30), 0.040)  # a millisecond for a prefill token
    assert pace.prefill_budget() == 10


def test_before_the_times_are_known_the_budget_is_small() -> None:
    pace = Pace()
    assert pace.prefill_budget() == 16
    pace.note(parts(1), 0.010)
    assert pace.prefill_budget() == 16


def test_a_mixed_step_faster_than_a_decode_says_nothing() -> None:
    """The clock of a busy machine: a decode took long, and the next step with prefill less."""
    pace = Pace()
    pace.note(parts(1), 0.010)
    pace.note(parts(1, 30), 0.005)
    assert pace.prefill_budget() == 16
    pace.note(parts(1, 30), 0.040)
    assert pace.prefill_budget() == 10


@pytest.mark.parametrize("seconds", [0.0, 1e-300])
def test_steps_without_a_measurable_time(seconds: float) -> None:
    pace = Pace()
    pace.note(parts(30), seconds)
    pace.note(parts(1), 0.010)
    assert pace.prefill_budget() == 2048


@given(st.lists(st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 10)), max_size=20))
def test_there_is_always_a_budget(steps: list[tuple[list[int], float]]) -> None:
    pace = Pace()
    for counts, seconds in steps:
        pace.note(parts(*counts), seconds)
        assert 8 <= pace.prefill_budget() <= 2048


def test_a_first_prefill_that_compiled_kernels_is_soon_forgotten() -> None:
    """With a budget of one token the steps would look like decodes, and the prefill time would never be corrected."""
    pace = Pace()
    pace.note(parts(64), 0.640)
    pace.note(parts(1), 0.010)
    assert pace.prefill_budget() == 8
    for _ in range(10):
        budget = pace.prefill_budget()
        pace.note(parts(1, budget), 0.010 + 0.0005 * budget)
    assert pace.prefill_budget() >= 19  # 10 ms at half a millisecond a token


@pytest.mark.parametrize(
    ("decoding", "prefilling", "budget"),
    [(1, 1, 10), (8, 1, 10), (4, 4, 10), (1, 3, 30), (2, 6, 30), (1, 40, 50), (0, 1, 10)],
)
def test_more_requests_that_wait_for_a_first_token_get_longer_steps(
    decoding: int, prefilling: int, budget: int
) -> None:
    pace = Pace()
    pace.note(parts(1, 1), 0.010)
    pace.note(parts(1, 1, 30), 0.040)
    assert pace.prefill_budget(decoding, prefilling) == budget
