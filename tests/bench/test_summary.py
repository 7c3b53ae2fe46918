"""Summary statistics, compared with NumPy and the standard library."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3 import Summary
from ov_phi3.bench.summary import percentile

TIMES = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=200)


class TestSummary:
    """Against NumPy and the standard library."""

    @given(TIMES)
    def test_equals_numpy(self, values: list[float]) -> None:
        summary = Summary.of(values)
        assert summary is not None
        assert summary.p50 == pytest.approx(np.percentile(values, 50))
        assert summary.p25 == pytest.approx(np.percentile(values, 25))
        assert summary.p75 == pytest.approx(np.percentile(values, 75))
        assert summary.mean == pytest.approx(np.mean(values))
        assert (summary.minimum, summary.maximum, summary.count) == (min(values), max(values), len(values))
        if len(values) > 1:
            assert summary.std == pytest.approx(statistics.stdev(values), abs=1e-6)

    @given(TIMES, st.floats(0, 1))
    def test_percentile_equals_numpy(self, values: list[float], share: float) -> None:
        assert percentile(sorted(values), share) == pytest.approx(np.quantile(values, share), rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize(
        ("count", "p90", "p99"), [(9, False, False), (10, True, False), (99, True, False), (100, True, True)]
    )
    def test_p90_needs_10_values_and_p99_needs_100(self, count: int, p90: bool, p99: bool) -> None:
        summary = Summary.of(range(count))
        assert summary is not None
        assert (summary.p90 is not None, summary.p99 is not None) == (p90, p99)

    def test_none_values_are_left_out(self) -> None:
        assert Summary.of([None, 3.0, None]) == Summary.of([3.0])
        assert Summary.of([None]) is None
