"""What a request may ask for: every option filled in, and checked against the model, the engine and the window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ov_phi3.errors import ConfigError, ContextOverflowError

if TYPE_CHECKING:
    from ov_phi3.engine.runner import Generator
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.kv.sizing import KVPool
    from ov_phi3.model.info import ModelInfo

__all__ = ["Limits", "seconds"]


@dataclass(frozen=True)
class Limits:
    """The bounds of a pipeline's requests.

    Attributes:
        info: the model.
        defaults: its own generation options.
        context_length: tokens that prompt and reply share.
        generator: knows where a reply must be computed afresh.
        pool: knows why the window is smaller than the model's.
    """

    info: ModelInfo
    defaults: GenerationConfig
    context_length: int
    generator: Generator
    pool: KVPool

    def resolve(self, wanted: GenerationConfig, prompt_tokens: int, *, streams: bool) -> GenerationConfig:
        """Every option filled in and checked against the room that the prompt leaves.

        Raises:
            ConfigError: an option that the model or a stream cannot have.
            ContextOverflowError: prompt and reply do not fit the context window.
        """
        room = self.context_length - prompt_tokens
        self.check_room(wanted, prompt_tokens, room)
        resolved = wanted.resolve(self.defaults, room=room, prompt_tokens=prompt_tokens)
        for name in ("num_beams", "num_return_sequences"):
            if streams and getattr(resolved, name) > 1:
                raise ConfigError(
                    f"{name}={getattr(resolved, name)} cannot be streamed: which reply wins is known at the end only. "
                    f"Use generate(), or {name}=1."
                )
        if resolved._is_search() and wanted.max_new_tokens is None and wanted.max_length is None:
            most = self.generator.search_room(prompt_tokens, resolved)
            if most is not None and most < (resolved.max_new_tokens or 0):
                least = min(resolved.min_new_tokens or 0, most)
                resolved = resolved.replace(max_new_tokens=most, min_new_tokens=least)
        biased = list(dict(resolved.logit_bias or ()))
        for name, ids in (("stop_token_ids", resolved.stop_token_ids or ()), ("logit_bias", biased)):
            wrong = [i for i in ids if i >= self.info.vocab_size]
            if wrong:
                raise ConfigError(f"{name} holds {wrong[0]}; ids go from 0 to {self.info.vocab_size - 1}.")
        return self._before_boundary(wanted, resolved, prompt_tokens)

    def _before_boundary(
        self, wanted: GenerationConfig, resolved: GenerationConfig, prompt_tokens: int
    ) -> GenerationConfig:
        """End a reply at the LongRoPE boundary where an option of it could not be carried across."""
        room = self.generator.reply_room(prompt_tokens)
        limit = resolved.max_new_tokens or 0
        if room is None or limit <= room or (why := self._cannot_cross(resolved)) is None:
            return resolved
        if self.generator.assisted_tokens:  # candidates are computed together with the token before them
            room -= max(self.generator.assisted_tokens, resolved.num_assistant_tokens or 0)
        if room < 1 or wanted.max_new_tokens is not None or wanted.max_length is not None:
            raise ConfigError(
                f"{why} cannot be carried past {self.info.rope_boundary} tokens, where this LongRoPE model is computed "
                f"afresh: the prompt has {prompt_tokens} tokens and the reply may have {limit}. "
                + (f"Ask for at most {room} new tokens, or leave the option out." if room > 0 else "Leave it out.")
            )
        return resolved.replace(max_new_tokens=room, min_new_tokens=min(resolved.min_new_tokens or 0, room))

    def _cannot_cross(self, config: GenerationConfig) -> str | None:
        """The option whose state the engine keeps from the reply's first token on, if there is one."""
        if self.generator.assisted_tokens:
            return "speculative decoding"
        for name in ("json_schema", "regex", "grammar"):
            if getattr(config, name) is not None:
                return name
        for name, idle in (
            ("presence_penalty", 0.0),
            ("frequency_penalty", 0.0),
            ("num_beams", 1),
            ("num_return_sequences", 1),
        ):
            if getattr(config, name) != idle:
                return f"{name}={getattr(config, name)}"
        return None

    def check_room(self, wanted: GenerationConfig, prompt_tokens: int, room: int) -> None:
        """Refuse a prompt, or a length that was asked for, past the context window.

        Raises:
            ContextOverflowError: they do not fit.
        """
        if room < 1:
            problem = f"the prompt has {prompt_tokens} tokens, which leaves no room for a reply"
        elif (wanted.max_new_tokens or 0) > room:
            problem = f"the prompt has {prompt_tokens} tokens and max_new_tokens is {wanted.max_new_tokens}"
        elif (wanted.min_new_tokens or 0) > room:
            problem = f"the prompt has {prompt_tokens} tokens and min_new_tokens is {wanted.min_new_tokens}"
        elif wanted.max_length is not None and not prompt_tokens < wanted.max_length <= self.context_length:
            problem = f"the prompt has {prompt_tokens} tokens and max_length is {wanted.max_length}"
        else:
            return
        advice = "Shorten the prompt" + (f", or ask for at most {room} new tokens." if room > 0 else ".")
        raise self.overflow(problem, prompt_tokens, wanted.max_new_tokens, advice)

    def overflow(self, problem: str, prompt_tokens: int, new: int | None, advice: str) -> ContextOverflowError:
        """The error for what does not fit the context window."""
        return ContextOverflowError(
            f"{problem}; prompt and reply share a context window of {self.context_length} tokens"
            f"{self.pool.because}. {advice}",
            prompt_tokens=prompt_tokens,
            max_new_tokens=new,
            context_length=self.context_length,
        )


def seconds(name: str, value: object) -> float:
    """A time that was given as an argument.

    Raises:
        ConfigError: not above 0, or not a number.
        TypeError: of another type.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not value > 0:
        raise ConfigError(f"{name}={value}; expected a number of seconds above 0, or None for as long as it takes.")
    try:
        return float(value)
    except OverflowError:
        return math.inf
