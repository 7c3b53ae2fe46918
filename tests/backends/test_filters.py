"""typical_p, top_n_sigma and XTC, each against its definition written out slowly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ov_phi3 import GenerationConfig
from ov_phi3.backends.filters import exclude_top_choices, narrow, typical
from ov_phi3.backends.sampling import Sampler

LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0], dtype=np.float32)
logits_of = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=300, unique=True).map(
    lambda x: np.array(x, dtype=np.float32)
)


def typical_set(weights: Any, mass: float) -> set[int]:
    p = [w / sum(weights) for w in weights]
    entropy = -sum(x * math.log(x) for x in p if x)
    order = sorted((i for i in range(len(p)) if p[i]), key=lambda i: abs(-math.log(p[i]) - entropy))
    kept, total = set(), 0.0
    for token in order:
        kept.add(token)
        total += p[token]
        if total >= mass:
            break
    return kept


def drawn(count: int = 3000, **options: Any) -> set[int]:
    config = GenerationConfig(seed=3, do_sample=True, **options).resolve(room=10**6)
    sampler = Sampler(config, np.zeros(1, dtype=np.int64), ())
    return {sampler.choose(LOGITS) for _ in range(count)}


@given(logits_of, st.floats(0.001, 1.0))
@example(np.array([0, 1, 2, 29, 0.75, -8, -9, -10], dtype=np.float32), 1.0)
def test_typical_equals_the_definition(logits: Any, mass: float) -> None:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    kept, expected = set(typical(weights, mass).tolist()), typical_set(weights.tolist(), mass)
    assert kept
    # Rounding may exchange one token at the limit, and move any number of tokens that are too unlikely to change a sum.
    share = sorted(weights[list(kept ^ expected)] / weights.sum())
    assert sum(share[:-2]) < 1e-12


def test_typical_can_exclude_the_most_likely_token() -> None:
    weights = np.array([0.4, *[0.01] * 60])
    assert 0 not in typical(weights, 0.3).tolist()


def test_typical_over_a_large_flat_distribution() -> None:
    assert len(typical(np.ones(4096), 0.5)) == 2048
    assert len(typical(np.ones(4096), 1.0)) == 4096


@given(logits_of, st.floats(0.01, 5))
def test_top_n_sigma_equals_the_definition(logits: Any, n: float) -> None:
    kept = narrow(logits, top_n_sigma=n) > -np.inf
    values = [float(x) for x in logits]
    mean = sum(values) / len(values)
    lowest = max(values) - n * math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    sure = np.abs(logits - lowest) > 1e-4
    assert kept[int(logits.argmax())]
    assert (kept == (logits >= lowest))[sure].all()


@given(logits_of, st.floats(0.1, 3), st.floats(0.1, 9))
def test_top_n_sigma_does_not_depend_on_the_temperature(logits: Any, n: float, temperature: float) -> None:
    kept = narrow(logits, temperature=temperature, top_n_sigma=n)
    assert (kept == narrow(logits, top_n_sigma=n)).all()


def test_top_n_sigma_without_the_excluded_and_the_penalized() -> None:
    plain = narrow(LOGITS, top_n_sigma=1.0)
    with_hole = np.append(LOGITS, np.float32(-np.inf))
    assert (narrow(with_hole, top_n_sigma=1.0)[:-1] == plain).all()
    with_penalty = np.append(LOGITS, np.float32(-1e30))
    assert (narrow(with_penalty, top_n_sigma=1.0, penalized=[8])[:-1] == plain).all()


def test_typical_looks_at_top_k() -> None:
    kept = np.flatnonzero(narrow(LOGITS, top_k=3, typical_p=0.999) > -np.inf)
    assert kept.tolist() == [0, 1, 2]


@given(logits_of, st.floats(0.0, 1.0))
def test_xtc_equals_the_definition(logits: Any, threshold: float) -> None:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    p = weights / weights.sum()
    top = sorted(np.flatnonzero((p >= threshold) & (p > 0)).tolist(), key=lambda i: -p[i])
    kept = exclude_top_choices(weights, threshold)
    assert set(np.flatnonzero(kept == 0)) == set(top[:-1]) | set(np.flatnonzero(weights == 0))
    assert (kept[kept > 0] == weights[kept > 0]).all()


@pytest.mark.parametrize("threshold", [0.51, 1.0])
def test_xtc_above_a_half_excludes_nothing(threshold: float) -> None:
    assert (exclude_top_choices(np.array([9.0, 1.0]), threshold) == [9, 1]).all()


class TestSampling:
    def test_xtc_never_and_always(self) -> None:
        assert 0 in drawn(xtc_probability=1e-12, xtc_threshold=0.1)
        p = np.exp(LOGITS.astype(np.float64))
        p /= p.sum()
        excluded = set(np.flatnonzero(p >= 0.1)[:-1])
        assert drawn(xtc_probability=1.0, xtc_threshold=0.1) == set(range(8)) - excluded

    def test_xtc_sometimes(self) -> None:
        config = GenerationConfig(seed=3, temperature=0.05, xtc_probability=0.3, xtc_threshold=1e-9).resolve(room=10**6)
        sampler = Sampler(config, np.zeros(1, dtype=np.int64), ())
        others = sum(sampler.choose(LOGITS) != 0 for _ in range(4000))
        assert 0.26 < others / 4000 < 0.34

    def test_xtc_after_top_k(self) -> None:
        assert drawn(top_k=2, xtc_probability=1.0, xtc_threshold=0.1) == {1}

    def test_typical_then_top_p(self) -> None:
        """top_p looks at what typical_p left, so that the two never exclude everything."""
        kept = typical_set(np.exp(LOGITS.astype(np.float64)).tolist(), 0.3)
        assert drawn(typical_p=0.3) == kept
        assert drawn(typical_p=0.3, top_p=1e-6) == {min(kept)}

    @pytest.mark.parametrize("name", ["typical_p", "top_n_sigma", "xtc_probability"])
    def test_turns_sampling_on(self, name: str) -> None:
        assert GenerationConfig(**{name: 0.5}).resolve(room=5).do_sample

    @pytest.mark.parametrize("temperature", [1e-30, 1e30])
    def test_extreme_values(self, temperature: float) -> None:
        extreme = {"typical_p": 1e-30, "top_n_sigma": 1e30, "xtc_probability": 1.0, "xtc_threshold": 0.0}
        assert drawn(10, temperature=temperature, **extreme) <= set(range(8))
        assert drawn(10, temperature=temperature, top_n_sigma=1e-30) == {0}
