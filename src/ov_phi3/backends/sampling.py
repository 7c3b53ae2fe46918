"""From logits to the next token, in numpy: penalties, biases, processors, filters and the random draw.

The order is GenAI's, so that a config means the same on both backends: repetition penalty, presence and frequency
penalty; then `logit_bias` and `logits_processors`, which GenAI does not have; then temperature; then the tokens that
pass all of `top_p`, `min_p` and `top_k`, each applied to the whole distribution.

Log-probabilities are those of the model's own logits, before all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.protocol import CallbackFailed
from ov_phi3.errors import GenerationError
from ov_phi3.generation.results import TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.generation.config import GenerationConfig

__all__ = ["Sampler", "filter_candidates", "log_softmax", "token_logprob"]

# Most likely tokens that top_p looks at first; eight times as many if they do not have enough probability.
_FIRST_LOOK = 64


class Sampler:
    """Chooses the tokens of one reply.

    Each reply has its own generator of random numbers, so that concurrent requests do not affect it.

    Args:
        config: fully resolved.
        ids: the prompt, int64, shape [tokens].
        end_ids: the model's end tokens, which `min_new_tokens` suppresses.
    """

    def __init__(self, config: GenerationConfig, ids: NDArray[np.int64], end_ids: Sequence[int]) -> None:
        self._config = config
        self._prompt = ids
        self._reply: list[int] = []
        self._seen: NDArray[np.int64] | None = None
        if config.repetition_penalty != 1.0:
            self._seen = np.unique(ids)
        self._counts: dict[int, int] = {}
        self._counted = bool(config.presence_penalty or config.frequency_penalty)
        bias = dict(config.logit_bias or ())
        self._bias = (np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32))
        self._ends = np.array(
            sorted({*(config.stop_token_ids or ()), *(() if config.ignore_eos else end_ids)}), dtype=np.int64
        )
        self._generator = np.random.Generator(np.random.PCG64(config.seed or 0))
        self._modifies_logits = bool(self._seen is not None or self._counted or bias or config.logits_processors)

    def choose(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token.

        Args:
            logits: of the last position, float32, shape [vocabulary]; not modified.
            allowed: which tokens may be chosen, bool, shape [vocabulary]; None for all.

        Raises:
            CallbackFailed: a logits processor raised, or returned something other than logits.
            GenerationError: no token is left to choose from.
        """
        config = self._config
        suppressed = len(self._reply) < (config.min_new_tokens or 0) and len(self._ends) > 0
        scores = logits
        if self._modifies_logits or suppressed:
            scores = self._processed(np.array(logits, dtype=np.float32))
            if suppressed:
                scores[self._ends] = -np.inf
        if allowed is not None:
            scores = _restrict(scores, logits, allowed)
        token = int(scores.argmax())
        self._check_highest(scores[token])
        if config.do_sample:
            token = self._draw(scores)
        self._note(token)
        return token

    def _check_highest(self, score: np.float32) -> None:
        """Refuse logits that no token follows from: numpy takes a NaN for the highest value wherever it stands."""
        if np.isnan(score):
            problem = "a logit is not a number (NaN)"
        elif score == -np.inf:
            problem = "all logits are minus infinity, so that no token is left to choose from"
        elif score == np.inf and self._config.do_sample:
            problem = (
                "a logit is infinite, which is no probability to sample with (a greedy reply would take that token)"
            )
        else:
            return
        raise GenerationError(
            f"{problem}. Look at logits_processors and logit_bias; without them, the model itself gives such logits."
        )

    def logprobs(self, logits: NDArray[np.float32], token: int) -> TokenLogprob | None:
        """Log-probability of a token and of the most likely ones; None if not requested."""
        count = self._config.top_logprobs
        return None if count is None else token_logprob(logits, token, count)

    def _note(self, token: int) -> None:
        self._reply.append(token)
        if self._seen is not None:
            at = int(np.searchsorted(self._seen, token))
            if at == len(self._seen) or self._seen[at] != token:
                self._seen = np.insert(self._seen, at, token)
        if self._counted:
            self._counts[token] = self._counts.get(token, 0) + 1

    def _processed(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        config = self._config
        if self._seen is not None:
            # CTRL's penalty (arXiv 1909.05858): divided where positive, multiplied where negative.
            penalty = np.float32(config.repetition_penalty or 1.0)
            seen = scores[self._seen]
            scores[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts:
            ids = np.fromiter(self._counts, dtype=np.int64)
            times = np.fromiter(self._counts.values(), dtype=np.float32)
            scores[ids] -= (
                np.float32(config.presence_penalty or 0.0) + np.float32(config.frequency_penalty or 0) * times
            )
        if len(self._bias[0]):
            scores[self._bias[0]] += self._bias[1]
        for processor in config.logits_processors or ():
            scores = self._called(processor, scores)
        return scores

    def _called(self, processor: Callable[..., Any], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits that a caller's processor returns."""
        ids = np.concatenate([self._prompt, np.array(self._reply, dtype=np.int64)])
        name = getattr(processor, "__name__", type(processor).__name__)
        try:
            returned = processor(ids, scores)
            changed = np.array(returned, dtype=np.float32)
            if changed.shape != scores.shape:
                raise TypeError(
                    f"the logits processor {name} gave back {_named(returned)}; expected the logits, float32, shape "
                    f"[{len(scores)}]."
                )
        except BaseException as exc:
            raise CallbackFailed from exc
        return changed

    def _draw(self, scores: NDArray[np.float32]) -> int:
        """Draw a token from the filtered distribution, by inverting its cumulative sum."""
        config = self._config
        ids, weights = filter_candidates(
            scores,
            temperature=config.temperature or 1.0,
            top_p=config.top_p or 1.0,
            top_k=config.top_k or 0,
            min_p=config.min_p or 0.0,
        )
        sums = np.cumsum(weights)
        index = int(np.searchsorted(sums, self._generator.random() * sums[-1], side="right"))
        index = min(index, len(sums) - 1)
        return index if ids is None else int(ids[index])


def _restrict(
    scores: NDArray[np.float32], logits: NDArray[np.float32], allowed: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """The scores of the allowed tokens; if other options rule all of them out, the structure goes first."""
    restricted = np.where(allowed, scores, np.float32(-np.inf))
    if np.isneginf(restricted).all():
        restricted = np.where(allowed, logits, np.float32(-np.inf))
    return restricted


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
        top_p: keep the fewest of the most likely tokens that together have this probability.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        min_p: keep tokens with at least this fraction of the most likely token's probability.

    Returns:
        Token ids, most likely first, shape [candidates], or None for the whole vocabulary in its order; and their
        weights, float64, not normalised.
    """
    weights = np.exp((scores - scores.max()).astype(np.float64) / temperature)
    vocabulary = len(weights)
    limit = top_k if 0 < top_k < vocabulary else vocabulary
    if limit == vocabulary and top_p >= 1.0 and min_p <= 0.0:
        return None, weights
    required = top_p * weights.sum() if top_p < 1.0 else np.inf
    look = min(limit if top_p >= 1.0 and min_p <= 0.0 else min(limit, _FIRST_LOOK), vocabulary)
    while True:
        ids = _most_likely(weights, look)
        candidates = weights[ids]
        # Fewest tokens that reach top_p: all before which the sum is still below it. At least one.
        count = 1 + int(np.count_nonzero(np.cumsum(candidates)[:-1] < required))
        count = min(count, int(np.count_nonzero(candidates >= min_p * candidates[0])))
        if count < look or look >= limit:
            return ids[:count], candidates[:count]
        look = min(limit, look * 8)


def token_logprob(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """The log-probability of a token, and of the `count` most likely ones."""
    logprobs = log_softmax(logits)
    best = _most_likely(logprobs, count) if count else ()
    return TokenLogprob(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of logits, shape [..., vocabulary]."""
    shifted = (logits - logits.max(axis=-1, keepdims=True)).astype(np.float64)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _most_likely(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the largest values, largest first; of equal ones the lower index."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _named(value: object) -> str:
    return f"an array of shape {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)[:60]
