"""The LongRoPE policy: where a sequence crosses the boundary, and what that means for its cache and its options.

LongRoPE is the RoPE variant of the Phi-3 models with a context of 128k tokens. Up to `rope_boundary` tokens it rotates
keys with one set of factors (short), and past it with another (long), in the whole sequence. Keys cached on one side
are wrong on the other. A reply that crosses the boundary therefore stops there and continues after all of its ids have
been prefilled again. The reference is the model recomputed without a cache; transformers'
`Phi3ForCausalLM.prepare_inputs_for_generation` drops its cache at the same length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.backends.protocol import Request
    from ov_phi3.generation.config import GenerationConfig

__all__ = ["LongRope"]

_NAMESPACE = b"past the LongRoPE boundary"
_SECOND_SEED = 0x9E3779B9  # 2**32 / golden ratio: the reply continues with other random numbers than it began with

# Options whose state the backend keeps from the reply's first token on, with the value that disables them.
_STATEFUL = (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("num_beams", 1), ("num_return_sequences", 1))


@dataclass(frozen=True)
class LongRope:
    """The policy of one pipeline.

    Attributes:
        boundary: see `ModelInfo.rope_boundary`; None for other models, and if the context window ends before it.
        assisted_tokens: most candidate tokens per step of a pipeline with prompt lookup or a draft model; 0 for others.
    """

    boundary: int | None = None
    assisted_tokens: int = 0

    def is_long(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens is past the boundary."""
        return self.boundary is not None and tokens > self.boundary

    @staticmethod
    def namespace(long_rope: bool) -> bytes:
        """Namespace in the prefix index of the sequences on one side of the boundary."""
        return _NAMESPACE if long_rope else b""

    def reply_room(self, prompt_tokens: int) -> int | None:
        """Reply tokens left before the boundary; None if the reply never crosses it.

        The last token of a reply is never fed back, so a reply may be one token longer than the distance.
        """
        boundary = self.boundary
        return None if boundary is None or prompt_tokens > boundary else boundary - prompt_tokens + 1

    def until_boundary(self, request: Request, room: int) -> Request:
        """The part of a request up to the boundary, `room` reply tokens long."""
        config = request.config
        least = min(config.min_new_tokens or 0, room)
        return replace(request, config=config.replace(max_new_tokens=room, min_new_tokens=least))

    def past_boundary(self, request: Request, ids: NDArray[np.int64], done: int) -> Request:
        """The rest of a request after `done` reply tokens; `ids` are the prompt and those tokens."""
        config = request.config
        changes: dict[str, Any] = {
            "max_new_tokens": (config.max_new_tokens or 0) - done,
            "min_new_tokens": max(0, (config.min_new_tokens or 0) - done),
        }
        if config.do_sample and config.seed is not None:
            changes["seed"] = config.seed ^ _SECOND_SEED
        return replace(request, ids=ids, config=config.replace(**changes))

    def score_spans(self, start: int, total: int) -> list[tuple[int, int]]:
        """The ranges of positions from `start` to below `total` that one set of factors predicts."""
        boundary = self.boundary
        if boundary is None or not start <= boundary < total - 1:
            return [(start, total)]
        # The last id that the short factors predict has `boundary` ids before it.
        return [(start, boundary + 1), (boundary + 1, total)]

    def limit(self, config: GenerationConfig, prompt_tokens: int, *, explicit_length: bool) -> GenerationConfig:
        """End a reply at the boundary if one of its options cannot cross it.

        Args:
            config: the options, fully resolved.
            prompt_tokens: length of the prompt.
            explicit_length: whether the caller asked for this length.

        Raises:
            ConfigError: the caller asked for a length past the boundary, or the prompt ends at it.
        """
        room = self.reply_room(prompt_tokens)
        length = config.max_new_tokens or 0
        if room is None or length <= room or (option := self._cannot_cross(config)) is None:
            return config
        if self.assisted_tokens:  # candidates are computed together with the token before them
            room -= max(self.assisted_tokens, config.num_assistant_tokens or 0)
        if room < 1 or explicit_length:
            raise ConfigError(
                f"{option} cannot be carried past {self.boundary} tokens, where this LongRoPE model is computed "
                f"afresh: the prompt has {prompt_tokens} tokens and the reply may have {length}. "
                + (f"Ask for at most {room} new tokens, or leave the option out." if room > 0 else "Leave it out.")
            )
        return config.replace(max_new_tokens=room, min_new_tokens=min(config.min_new_tokens or 0, room))

    def _cannot_cross(self, config: GenerationConfig) -> str | None:
        """The first option that cannot cross the boundary, or None."""
        if self.assisted_tokens:
            return "speculative decoding"
        if config.structure is not None:
            return config.structure
        for name, disabled in _STATEFUL:
            if getattr(config, name) != disabled:
                return f"{name}={getattr(config, name)}"
        return None
