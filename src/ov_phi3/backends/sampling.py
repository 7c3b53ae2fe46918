"""From logits to the next token, in numpy: penalties, biases, processors, filters and the random draw.

The order is GenAI's, so that a config means the same on both backends, with llama.cpp's for what GenAI does not have:
repetition penalty, presence and frequency penalty, DRY; then `logit_bias` and `logits_processors`; then the tokens that
may not come are excluded (`no_repeat_ngram_size`, `bad_words`, end tokens before `min_new_tokens`), whatever a
processor did, and those that a structure does not allow; then temperature; then the filters, in the order of
`filters.py`.

Log-probabilities are those of the model's own logits, before all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.filters import exclude_top_choices, filter_candidates, largest, narrow
from ov_phi3.backends.protocol import CallbackFailed
from ov_phi3.backends.repetition import DryPenalty, LoopDetector, NgramBans
from ov_phi3.backends.words import BadWords, Breakers
from ov_phi3.errors import GenerationError
from ov_phi3.generation.results import TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.words import TokenTexts
    from ov_phi3.generation.config import GenerationConfig

__all__ = ["Sampler", "log_softmax", "token_logprob"]


class Sampler:
    """Chooses the tokens of one reply.

    Each reply has its own generator of random numbers, so that concurrent requests do not affect it.

    Args:
        config: fully resolved.
        ids: the prompt, int64, shape [tokens].
        end_ids: the model's end tokens, which `min_new_tokens` suppresses.
        texts: the vocabulary, for options that depend on what tokens say.
    """

    def __init__(
        self, config: GenerationConfig, ids: NDArray[np.int64], end_ids: Sequence[int], texts: TokenTexts | None = None
    ) -> None:
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
        self._dry = _dry(config, ids, texts)
        self._penalized: list[int] = []
        size = config.no_repeat_ngram_size or 0
        self._bans: list[NgramBans | BadWords] = [NgramBans(size, ids.tolist())] if size else []
        if config.bad_words:
            self._bans.append(BadWords(config.bad_words, ids.tolist(), _required(texts)))
        self._loop: LoopDetector | None = None
        if config.stop_on_loop is not None:
            window, repeats = config.stop_on_loop
            self._loop = LoopDetector(window, repeats, config.max_new_tokens or 0)
        self._modifies_logits = bool(
            self._seen is not None or self._counted or self._dry or bias or config.logits_processors
        )

    @property
    def in_loop(self) -> bool:
        """Whether the reply ends by `stop_on_loop`, which waits for `min_new_tokens`."""
        least = self._config.min_new_tokens or 0
        return self._loop is not None and self._loop.found and len(self._reply) >= least

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
        if self._modifies_logits or suppressed or self._bans:
            scores = self._processed(np.array(logits, dtype=np.float32))
            if suppressed:
                scores[self._ends] = -np.inf
            for bans in self._bans:
                scores[bans.banned()] = -np.inf
        token = int(scores.argmax())
        # The best token of all is also the best of the allowed ones, if it is allowed.
        if allowed is not None and (config.do_sample or not (allowed[token] and scores[token] > -np.inf)):
            scores = self._restrict(scores, logits, allowed)
            token = int(scores.argmax())
        self._check_highest(scores[token])
        if config.do_sample:
            token = self._draw(scores)
        self._note(token)
        return token

    @property
    def needs_all_logits(self) -> bool:
        """Whether it needs the logits of a token also where there is only one that may come."""
        config = self._config
        return bool(config.logits_processors or config.bad_words) or config.top_logprobs is not None

    def take(self, token: int) -> None:
        """Note the only token that may come, chosen without logits; the random numbers go on as with them."""
        if self._config.do_sample:
            self._generator.random(2 if self._config.xtc_probability else 1)
        self._note(token)

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
        options = ", ".join(option.split("=")[0] for option in self._config.logit_options)
        cause = f"Look at {options}." if options else "The model itself gives such logits."
        raise GenerationError(f"{problem}. {cause}")

    def _restrict(
        self, scores: NDArray[np.float32], logits: NDArray[np.float32], allowed: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """The scores of the allowed tokens; if other options exclude all of them, the structure has precedence."""
        restricted = np.where(allowed, scores, np.float32(-np.inf))
        if not np.isneginf(restricted).all():
            return restricted
        if self._config.bad_words:
            raise GenerationError(
                f"{self._config.structure} allows only tokens here that bad_words excludes. Change one of them."
            )
        return np.where(allowed, logits, np.float32(-np.inf))

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
        for listener in (self._dry, self._loop, *self._bans):
            if listener is not None:
                listener.note(token)

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
        if self._dry is not None:
            self._penalized = self._dry.apply(scores)
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
        temperature, top_k = config.temperature or 1.0, config.top_k or 0
        scores = narrow(
            scores,
            temperature=temperature,
            top_n_sigma=config.top_n_sigma or 0.0,
            top_k=top_k,
            typical_p=config.typical_p or 1.0,
            penalized=self._penalized,
        )
        ids, weights = filter_candidates(
            scores, temperature=temperature, top_p=config.top_p or 1.0, top_k=top_k, min_p=config.min_p or 0.0
        )
        if config.xtc_probability and self._generator.random() < config.xtc_probability:
            weights = exclude_top_choices(weights, config.xtc_threshold or 0.0)
        sums = np.cumsum(weights)
        index = int(np.searchsorted(sums, self._generator.random() * sums[-1], side="right"))
        index = min(index, len(sums) - 1)
        return index if ids is None else int(ids[index])


def _dry(config: GenerationConfig, ids: NDArray[np.int64], texts: TokenTexts | None) -> DryPenalty | None:
    if not config.dry_multiplier:
        return None
    return DryPenalty(
        config.dry_multiplier,
        config.dry_base or 1.0,
        config.dry_allowed_length or 1,
        -1 if config.dry_penalty_last_n is None else config.dry_penalty_last_n,
        ids.tolist(),
        Breakers(config.dry_sequence_breakers or (), _required(texts)),
    )


def _required(texts: TokenTexts | None) -> TokenTexts:
    if texts is None:
        raise TypeError("bad_words and DRY need the texts of the tokens")
    return texts


def token_logprob(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """The log-probability of a token, and of the `count` most likely ones."""
    logprobs = log_softmax(logits)
    best = largest(logprobs, count) if count else ()
    return TokenLogprob(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of logits, shape [..., vocabulary]."""
    shifted = (logits - logits.max(axis=-1, keepdims=True)).astype(np.float64)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _named(value: object) -> str:
    return f"an array of shape {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)[:60]
