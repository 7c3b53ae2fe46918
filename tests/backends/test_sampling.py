"""The next token: which candidates stay, how one is drawn, and that the draws follow the distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3 import GenerationConfig, GenerationError, Pipeline
from ov_phi3.backends.protocol import CallbackFailed
from ov_phi3.backends.sampling import Sampler, filter_candidates, log_softmax, token_logprob

LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0], dtype=np.float32)
CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]


def set_logit(logits: Any, at: int, value: float) -> Any:
    logits[at] = value
    return logits


def sampler(ids: list[int] | None = None, ends: tuple[int, ...] = (), **options: Any) -> Sampler:
    config = GenerationConfig(**options).resolve(room=1000)
    return Sampler(config, np.array(ids or [0], dtype=np.int64), ends)


def expected(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Any:
    """The distribution by the definitions, written out slowly, token by token."""
    weights = [math.exp(float(x) / temperature) for x in logits]
    probabilities = [w / sum(weights) for w in weights]
    order = sorted(range(len(logits)), key=lambda i: -probabilities[i])
    out = [0.0] * len(logits)
    before = 0.0
    for rank, token in enumerate(order):
        p = probabilities[token]
        if (top_k and rank >= top_k) or (rank and top_p < 1 and before >= top_p) or p < min_p * probabilities[order[0]]:
            break
        out[token] = p
        before += p
    return np.array(out) / sum(out)


def chi_square(counts: np.ndarray, distribution: np.ndarray) -> float:
    """Pearson's statistic as a multiple of the value that one draw in a million exceeds (Wilson-Hilferty)."""
    assert counts[distribution == 0].sum() == 0, "a token was drawn that the options exclude"
    expected_counts = distribution[distribution > 0] * counts.sum()
    drawn = counts[distribution > 0]
    if len(expected_counts) == 1:
        return 0.0
    freedom = len(expected_counts) - 1
    statistic = ((drawn - expected_counts) ** 2 / expected_counts).sum()
    limit = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(statistic / limit)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    chooser = sampler(do_sample=True, seed=11, **options)
    counts = np.bincount([chooser.choose(LOGITS) for _ in range(20_000)], minlength=len(LOGITS))
    assert chi_square(counts, expected(LOGITS, **options)) < 1


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_chi_square_test_sees_a_bug(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails for a sampler that takes the square root of every weight, for all options."""
    from ov_phi3.backends import sampling

    real = sampling.filter_candidates

    def wrong(*args: Any, **named: Any) -> Any:
        ids, weights = real(*args, **named)
        return ids, np.sqrt(weights)

    monkeypatch.setattr(sampling, "filter_candidates", wrong)
    chooser = sampler(do_sample=True, seed=11, **options)
    counts = np.bincount([chooser.choose(LOGITS) for _ in range(20_000)], minlength=len(LOGITS))
    assert chi_square(counts, expected(LOGITS, **options)) > 1


@pytest.mark.parametrize("options", CASES[1:], ids=str)
def test_replies_of_the_engine_follow_the_distribution(tiny_loop: Pipeline, options: dict[str, Any]) -> None:
    """On the real engine: a processor leaves eight tokens, and the draws follow their distribution."""
    some = np.arange(100, 108)

    def small(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        out = np.full_like(logits, -np.inf)
        out[some] = LOGITS
        return out

    prompt = tiny_loop.encode("Hi").tolist()
    reply = tiny_loop.generate(
        prompt, logits_processors=[small], max_new_tokens=400, ignore_eos=True, do_sample=True, seed=5, **options
    )
    counts = np.bincount(np.array(reply.token_ids) - 100, minlength=len(LOGITS))
    assert counts.sum() == 400
    assert chi_square(counts, expected(LOGITS, **options)) < 1


logits_of = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=300).map(
    lambda x: np.array(x, dtype=np.float32)
)


class TestFilterCandidates:
    @given(
        logits_of,
        st.floats(0.05, 3),
        st.sampled_from([0, 1, 2, 5, 70, 1000]),
        st.sampled_from([1.0, 0.01, 0.5, 0.9, 0.999]),
        st.sampled_from([0.0, 0.001, 0.3, 0.99]),
    )
    def test_equals_the_definitions(self, logits: Any, temperature: float, k: int, p: float, m: float) -> None:
        ids, weights = filter_candidates(logits, temperature=temperature, top_k=k, top_p=p, min_p=m)
        whole = np.zeros(len(logits))
        whole[slice(None) if ids is None else ids] = weights
        assert np.all(weights >= 0)
        assert weights.sum() > 0
        reference = expected(logits, temperature, k, p, m)
        got = whole / whole.sum()
        # Where a token stands right on a limit, rounding may take it in or leave it out; no other may differ by more.
        if np.count_nonzero(reference) == np.count_nonzero(got):
            assert np.allclose(np.sort(reference), np.sort(got), atol=1e-9)
        else:
            assert abs(np.count_nonzero(reference) - np.count_nonzero(got)) <= 1 or len(set(logits.tolist())) < len(
                logits
            )

    def test_a_flat_distribution_is_searched_to_its_end(self) -> None:
        ids, weights = filter_candidates(np.zeros(5000, dtype=np.float32), top_p=0.5)
        assert ids is not None
        assert ids.tolist() == list(range(2500))
        assert len(weights) == 2500

    def test_equal_ones_in_order(self) -> None:
        ids, _ = filter_candidates(np.array([1, 3, 3, 3, 0], dtype=np.float32), top_k=2)
        assert ids is not None
        assert ids.tolist() == [1, 2]


class TestSampler:
    def test_greedy(self) -> None:
        assert sampler().choose(LOGITS) == 0

    def test_leaves_the_logits(self) -> None:
        mine = LOGITS.copy()
        sampler(repetition_penalty=2.0, logit_bias={3: 5.0}, presence_penalty=1.0).choose(mine)
        assert (mine == LOGITS).all()

    def test_repetition_penalty_is_for_prompt_and_reply(self) -> None:
        chooser = sampler([0, 7], repetition_penalty=1.5)
        assert chooser.choose(LOGITS) == 1  # 2 / 1.5 is less than 1.5
        assert chooser.choose(LOGITS) == 0  # now 1.5 / 1.5 is, too
        negative = sampler([0], repetition_penalty=1.5)
        assert negative.choose(np.array([-1.0, -1.4], dtype=np.float32)) == 1

    def test_presence_and_frequency_count_the_reply_only(self) -> None:
        present = sampler([0, 0], presence_penalty=0.6)
        assert [present.choose(LOGITS) for _ in range(4)] == [0, 1, 0, 0]
        frequent = sampler([0, 0], frequency_penalty=0.3)
        assert [frequent.choose(LOGITS) for _ in range(5)] == [0, 0, 1, 0, 1]

    def test_bias(self) -> None:
        assert sampler(logit_bias={5: 10.0}).choose(LOGITS) == 5
        assert sampler(logit_bias={0: -math.inf, "1": -100}).choose(LOGITS) == 2

    def test_min_new_tokens_holds_ends_back(self) -> None:
        chooser = sampler(ends=(0,), min_new_tokens=2, stop_token_ids=[1])
        assert [chooser.choose(LOGITS) for _ in range(3)] == [2, 2, 0]

    def test_seed(self) -> None:
        options = {"do_sample": True, "temperature": 1.5}
        one, same, other = (sampler(seed=s, **options) for s in (1, 1, 2))
        draws = [[chooser.choose(LOGITS) for _ in range(50)] for chooser in (one, same, other)]
        assert draws[0] == draws[1] != draws[2]

    def test_numpys_own_seed_has_no_part(self) -> None:
        draws = []
        for noise in (1, 2):
            np.random.seed(noise)
            chooser = sampler(seed=1, do_sample=True)
            draws.append([chooser.choose(LOGITS) for _ in range(20)])
        assert draws[0] == draws[1]

    def test_processors_run_in_order_and_see_all_ids(self) -> None:
        seen = []

        def first(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
            seen.append(ids.tolist())
            logits[4] = 50
            return logits

        def second(ids: np.ndarray, logits: np.ndarray) -> list[float]:
            return (logits * np.where(np.arange(len(logits)) == 4, -1, 1)).tolist()

        chooser = sampler([5, 6], logits_processors=[first, second])
        assert [chooser.choose(LOGITS) for _ in range(2)] == [0, 0]
        assert seen == [[5, 6], [5, 6, 0]]

    @pytest.mark.parametrize("wrong", [None, np.zeros(3), "x", 1.0, np.zeros((1, 8))])
    def test_a_processor_that_gives_no_logits(self, wrong: Any) -> None:
        with pytest.raises(CallbackFailed) as caught:
            sampler(logits_processors=[lambda ids, logits: wrong]).choose(LOGITS)
        assert isinstance(caught.value.__cause__, (TypeError, ValueError))

    @pytest.mark.parametrize("sample", [True, False])
    def test_nothing_left(self, sample: bool) -> None:
        chooser = sampler(logits_processors=[lambda ids, logits: np.full(8, -np.inf)], do_sample=sample)
        with pytest.raises(GenerationError, match="no token is left"):
            chooser.choose(LOGITS)

    @pytest.mark.parametrize("at", range(8))
    @pytest.mark.parametrize("sample", [True, False])
    def test_one_logit_that_is_not_a_number(self, at: int, sample: bool) -> None:
        chooser = sampler(logits_processors=[lambda ids, logits: set_logit(logits, at, np.nan)], do_sample=sample)
        with pytest.raises(GenerationError, match="NaN"):
            chooser.choose(LOGITS)

    @pytest.mark.parametrize("at", range(8))
    def test_an_infinite_logit_is_chosen_if_greedy_and_refused_if_sampling(self, at: int) -> None:
        options: dict[str, Any] = {"logits_processors": [lambda ids, logits: set_logit(logits, at, np.inf)]}
        assert sampler(**options, do_sample=False).choose(LOGITS) == at
        with pytest.raises(GenerationError, match="infinite"):
            sampler(**options, do_sample=True).choose(LOGITS)

    def test_logprobs_are_the_models_own(self) -> None:
        chooser = sampler(logit_bias={5: 10.0}, top_logprobs=3)
        token = chooser.choose(LOGITS)
        logprob = chooser.logprobs(LOGITS, token)
        reference = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum())
        assert logprob is not None
        assert logprob.token_id == 5
        assert logprob.logprob == pytest.approx(reference[5])
        assert [i for i, _ in logprob.top] == [0, 1, 2]
        assert [p for _, p in logprob.top] == pytest.approx(reference[:3].tolist())
        assert sampler().logprobs(LOGITS, 0) is None
        assert token_logprob(LOGITS, 2, 0).top == ()

    def test_log_softmax_of_large_numbers(self) -> None:
        rows = log_softmax(np.array([[1e4, 0], [-1e4, -1e4]], dtype=np.float32))
        assert rows.tolist() == [[0, -1e4], [pytest.approx(-math.log(2))] * 2]
