"""Filters of the sampling: which candidates stay, each by the definition that its docstring names.

The order is llama.cpp's (`--samplers`): top_n_sigma, top_k, typical_p, top_p, min_p, XTC; with two differences, both
because OpenVINO GenAI does it so and a config means the same on both backends. The temperature comes first instead of
last, as in transformers too. And `top_k`, `top_p` and `min_p` are each applied to the same distribution, instead of one
to what another left. That distribution is what `top_n_sigma` and `typical_p` left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["exclude_top_choices", "filter_candidates", "largest", "narrow", "typical"]

_FIRST_LOOK = 64  # values that a filter sorts first; eight times as many if they do not have enough probability


def narrow(
    scores: NDArray[np.float32],
    *,
    temperature: float = 1.0,
    top_n_sigma: float = 0.0,
    top_k: int = 0,
    typical_p: float = 1.0,
    penalized: Sequence[int] = (),
) -> NDArray[np.float32]:
    """The scores with minus infinity for the tokens that `top_n_sigma` and `typical_p` exclude.

    Args:
        scores: logits, float32, shape [vocabulary]; not modified.
        temperature: the logits are divided by it.
        top_n_sigma: keep logits at most this many standard deviations below the largest (Top-nσ, arXiv 2411.07641);
            tokens that are excluded already do not count; 0 keeps all. The temperature does not matter to it.
        top_k: limits what `typical_p` looks at; 0 for no limit.
        typical_p: see `typical`; 1 keeps all.
        penalized: tokens that the standard deviation leaves out: one penalty of thousands would make it so large that
            nothing is excluded.
    """
    if top_n_sigma > 0:
        counted = scores > -np.inf
        counted[list(penalized)] = False
        noise = scores[counted].astype(np.float64).std() if counted.any() else 0.0
        lowest = scores.max() - top_n_sigma * noise
        scores = np.where(scores >= lowest, scores, np.float32(-np.inf))
    if typical_p < 1:
        if 0 < top_k < len(scores):
            scores = _only(scores, largest(scores, top_k))
        scores = _only(scores, typical(np.exp(_scaled(scores, temperature)), typical_p))
    return scores


def typical(weights: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """The tokens of locally typical sampling (arXiv 2202.00666).

    They are the fewest that together have the probability `mass`, taken in the order of how little their information
    content, -log p, differs from the entropy of the distribution. The most likely token need not be among them.

    Args:
        weights: of all tokens, not normalised, shape [vocabulary].
        mass: a probability in (0, 1].
    """
    ids = np.flatnonzero(weights > 0)
    probabilities = weights[ids] / weights[ids].sum()
    information = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    closeness = -np.abs(information - probabilities @ information)
    look = min(_FIRST_LOOK, len(ids))
    while True:
        best = largest(closeness, look)
        count = 1 + int(np.count_nonzero(np.cumsum(probabilities[best])[:-1] < mass))
        if count < look or look == len(ids):
            return ids[best[:count]]
        look = len(ids)  # a broad distribution needs most of them: one sort costs less than several looks


def filter_candidates(
    scores: NDArray[np.float32],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
    """The tokens that sampling chooses from, and their weights.

    Args:
        scores: logits, float32, shape [vocabulary].
        temperature: the logits are divided by it.
        top_p: keep the fewest of the most likely tokens that together have this probability (arXiv 1904.09751).
        top_k: keep this many of the most likely tokens; 0 keeps all.
        min_p: keep tokens with at least this fraction of the most likely token's probability (arXiv 2407.01082).

    Returns:
        Token ids, most likely first, shape [candidates], or None for the whole vocabulary in its order; and their
        weights, float64, not normalised.
    """
    weights = np.exp(_scaled(scores, temperature))
    vocabulary = len(weights)
    limit = top_k if 0 < top_k < vocabulary else vocabulary
    if limit == vocabulary and top_p >= 1.0 and min_p <= 0.0:
        return None, weights
    required = top_p * weights.sum() if top_p < 1.0 else np.inf
    look = min(limit if top_p >= 1.0 and min_p <= 0.0 else min(limit, _FIRST_LOOK), vocabulary)
    while True:
        ids = largest(weights, look)
        candidates = weights[ids]
        # Fewest tokens that reach top_p: all before which the sum is still below it. At least one.
        count = 1 + int(np.count_nonzero(np.cumsum(candidates)[:-1] < required))
        count = min(count, int(np.count_nonzero(candidates >= min_p * candidates[0])))
        if count < look or look >= limit:
            return ids[:count], candidates[:count]
        look = min(limit, look * 8)


def exclude_top_choices(weights: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """The weights with 0 for all but the least likely of the tokens that have at least this probability.

    This is XTC (https://github.com/oobabooga/text-generation-webui/pull/6335). Its author lets line ends and end tokens
    prevent it; as in llama.cpp, they do not here.

    Args:
        weights: of the candidates, not normalised, shape [candidates]; not modified.
        threshold: a probability; above 0.5 nothing is excluded.
    """
    probabilities = weights / weights.sum()
    top = np.flatnonzero((probabilities >= threshold) & (weights > 0))
    if len(top) < 2:
        return weights
    least = len(top) - 1 - int(probabilities[top][::-1].argmin())
    weights = weights.copy()
    weights[np.delete(top, least)] = 0.0
    return weights


def largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Indices of the largest values, largest first; of equal ones the lower index."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _scaled(scores: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # a tiny temperature: all but the largest become minus infinity
        return np.asarray((scores - scores.max()).astype(np.float64) / temperature)


def _only(scores: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    kept = np.full_like(scores, -np.inf)
    kept[ids] = scores[ids]
    return kept
