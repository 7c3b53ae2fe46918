"""The limits of a request: every option filled in and checked against the model, the backend and the window."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ov_phi3.errors import ConfigError, ContextOverflowError
from ov_phi3.generation.contradictions import check_resolved

if TYPE_CHECKING:
    from ov_phi3.engine.longrope import LongRope
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.kv.prefix_index import PrefixIndex

__all__ = ["Limits", "check_ids", "seconds"]


@dataclass(frozen=True)
class Limits:
    """The limits of one pipeline.

    Attributes:
        defaults: the model's own generation options.
        context_length: tokens that prompt and reply share.
        reason: why the context length is below the model's; starts with a space, or is empty.
        vocab_size: token ids are below this.
        long_rope: ends replies whose options cannot cross the boundary.
        index: index of the prefix cache, which several sequences at once must fit into; None if there is none.
    """

    defaults: GenerationConfig
    context_length: int
    reason: str
    vocab_size: int
    long_rope: LongRope
    index: PrefixIndex | None = None

    def resolve(self, config: GenerationConfig, prompt_tokens: int, *, streamed: bool) -> GenerationConfig:
        """Fill in every option and check it against the room that the prompt leaves.

        Raises:
            ConfigError: an option that the model, or a stream, does not support.
            ContextOverflowError: prompt and reply do not fit the context window.
        """
        room = self.context_length - prompt_tokens
        self.check_room(config, prompt_tokens)
        resolved = config.resolve(self.defaults, room=room, prompt_tokens=prompt_tokens)
        if streamed:
            _check_streamable(resolved)
        check_resolved(resolved)
        explicit_length = config.max_new_tokens is not None or config.max_length is not None
        if resolved.is_multi_sequence and not explicit_length:
            resolved = self._limit_several(resolved, prompt_tokens)
        check_ids(resolved, self.vocab_size)
        return self.long_rope.limit(resolved, prompt_tokens, explicit_length=explicit_length)

    def _limit_several(self, resolved: GenerationConfig, prompt_tokens: int) -> GenerationConfig:
        """Shorten several sequences without a requested length to what a cache of fixed size holds."""
        if self.index is None or self.index.growable:
            return resolved
        block = self.index.block_size
        free = self.index.capacity // block - -(-prompt_tokens // block)
        most = max(1, (free // resolved.num_sequences - 1) * block)
        if most >= (resolved.max_new_tokens or 0):
            return resolved
        return resolved.replace(max_new_tokens=most, min_new_tokens=min(resolved.min_new_tokens or 0, most))

    def check_room(self, config: GenerationConfig, prompt_tokens: int) -> None:
        """Refuse a prompt, or a requested length, past the context window.

        Raises:
            ContextOverflowError: they do not fit.
        """
        room = self.context_length - prompt_tokens
        if room < 1:
            problem = f"the prompt has {prompt_tokens} tokens, which leaves no room for a reply"
        elif (config.max_new_tokens or 0) > room:
            problem = f"the prompt has {prompt_tokens} tokens and max_new_tokens is {config.max_new_tokens}"
        elif (config.min_new_tokens or 0) > room:
            problem = f"the prompt has {prompt_tokens} tokens and min_new_tokens is {config.min_new_tokens}"
        elif config.max_length is not None and not prompt_tokens < config.max_length <= self.context_length:
            problem = f"the prompt has {prompt_tokens} tokens and max_length is {config.max_length}"
        else:
            return
        advice = "Shorten the prompt" + (f", or ask for at most {room} new tokens." if room > 0 else ".")
        raise self.overflow(problem, prompt_tokens, config.max_new_tokens, advice)

    def overflow(self, problem: str, prompt_tokens: int, new: int | None, advice: str) -> ContextOverflowError:
        """The error for a request that does not fit the context window."""
        return ContextOverflowError(
            f"{problem}; prompt and reply share a context window of {self.context_length} tokens"
            f"{self.reason}. {advice}",
            prompt_tokens=prompt_tokens,
            max_new_tokens=new,
            context_length=self.context_length,
        )


def check_ids(config: GenerationConfig, vocab_size: int) -> None:
    """Refuse options that name token ids outside of the vocabulary.

    Raises:
        ConfigError: one of them does.
    """
    biased = list(dict(config.logit_bias or ()))
    bad = [i for word in config.bad_words or () if not isinstance(word, str) for i in word]
    stops = config.stop_token_ids or ()
    for name, ids in (("stop_token_ids", stops), ("logit_bias", biased), ("bad_words", bad)):
        outside = [i for i in ids if i >= vocab_size]
        if outside:
            raise ConfigError(f"{name} holds {outside[0]}; ids go from 0 to {vocab_size - 1}.")


def _check_streamable(resolved: GenerationConfig) -> None:
    for name in ("num_beams", "num_return_sequences"):
        if getattr(resolved, name) > 1:
            raise ConfigError(
                f"{name}={getattr(resolved, name)} cannot be streamed: which reply wins is known at the end only. "
                f"Use generate(), or {name}=1."
            )


def seconds(name: str, value: object) -> float:
    """A duration given as an argument, in seconds.

    Raises:
        ConfigError: not above 0, or not a number.
        TypeError: of another type.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are among them
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    try:
        duration = float(value)
    except OverflowError:  # an integer too large for a float
        duration = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if not duration > 0:
        raise ConfigError(f"{name}={value}; expected a number of seconds above 0, or None for as long as it takes.")
    return duration
