"""Latency of a reply, computed from timestamps.

There are two clocks. The *engine* clock is `openvino_genai`'s: it starts inside `generate` and stamps a token before it
is decoded and passed on. Our clock starts when the request is made and stamps a token when it reaches the consumer's
side, so it includes tokenization, the wait for other requests and the callback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Metrics"]


@dataclass(frozen=True)
class Metrics:
    """Latency of one reply. All times are in milliseconds.

    Attributes:
        prompt_tokens: length of the prompt.
        generated_tokens: length of the reply, end token included.
        reused_tokens: prompt tokens whose keys and values came from the cache; None if unknown (a scheduler config of
            the caller with cache eviction or sparse attention).
        ttft_ms: time to first token (TTFT), from the request to the first token id; None without a token.
        first_text_ms: from the request to the first text that can be shown; later than `ttft_ms` if the first tokens
            are part of a character or may start a stop string.
        tpot_ms: time per output token (TPOT), (last token - first token) / (tokens - 1), the definition of vLLM's
            serving benchmark; None for fewer than two tokens.
        total_ms: from the request to the end of the reply.
        queue_ms: the part of `ttft_ms` spent in the request queue, waiting for earlier requests on the same pipeline.
        token_times_ms: time of each token, counted from the request. Tokens of one step have the same time.
        engine_ttft_ms: time to first token by the engine's clock; None if it has none.
        engine_tpot_ms: mean gap between tokens by the engine's clock; None if it has none.
        recomputed_tokens: tokens computed a second time because the reply crossed the LongRoPE boundary. The gap before
            the first token behind the boundary includes that prefill. 0 for all other replies and models.
        steps: passes of the model that gave tokens; with speculation or a structure fewer than tokens. None if unknown
            (`backend="llm_pipeline"`), as are the next three.
        drafted_tokens: tokens that were guessed and computed together with the token before them.
        accepted_tokens: guessed tokens that are part of the reply.
        forced_tokens: tokens that took no pass of their own because the structure allowed no other. Every token of a
            reply is from a step of its own, accepted, or forced.
        load_ms: the part of `ttft_ms` spent on loading the model again after it was unloaded; None if it was in memory.
    """

    prompt_tokens: int
    generated_tokens: int
    reused_tokens: int | None
    ttft_ms: float | None
    first_text_ms: float | None
    tpot_ms: float | None
    total_ms: float
    queue_ms: float
    token_times_ms: tuple[float, ...]
    engine_ttft_ms: float | None = None
    engine_tpot_ms: float | None = None
    recomputed_tokens: int = 0
    steps: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    forced_tokens: int | None = None
    load_ms: float | None = None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of the reply for each pass of the model; None if the passes are unknown."""
        return self.generated_tokens / self.steps if self.steps else None

    @property
    def inter_token_ms(self) -> tuple[float, ...]:
        """Gaps between successive tokens; 0 between tokens of one step."""
        return tuple(b - a for a, b in zip(self.token_times_ms, self.token_times_ms[1:], strict=False))

    @property
    def tokens_per_second(self) -> float | None:
        """Output rate while decoding, 1000 / `tpot_ms`; without the first token, whose time is the prefill's."""
        return 1000.0 / self.tpot_ms if self.tpot_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        rates = {"tokens_per_second": self.tokens_per_second, "tokens_per_step": self.tokens_per_step}
        return {**asdict(self), **rates}

    def __repr__(self) -> str:
        return f"<Metrics: {self}>"

    def __str__(self) -> str:
        reused = f" ({self.reused_tokens} from the cache)" if self.reused_tokens else ""
        parts = [f"{self.prompt_tokens} prompt tokens{reused}", f"{self.generated_tokens} new"]
        if self.ttft_ms is not None:
            loading = "" if self.load_ms is None else f" ({self.load_ms:.0f} ms of it to load the model again)"
            parts.append(f"first token {self.ttft_ms:.0f} ms{loading}")
        if self.tpot_ms is not None:
            parts.append(f"{self.tpot_ms:.1f} ms per token ({self.tokens_per_second:.1f} tokens/s)")
        saved = [f"{self.forced_tokens} forced"] if self.forced_tokens else []
        if self.drafted_tokens:
            saved.append(f"{self.accepted_tokens} of {self.drafted_tokens} drafts accepted")
        if saved:
            parts.append(f"{self.tokens_per_step:.2f} tokens per step ({', '.join(saved)})")
        if self.recomputed_tokens:
            parts.append(f"{self.recomputed_tokens} tokens computed again past the LongRoPE boundary")
        return ", ".join(parts)

    @classmethod
    def from_stamps(
        cls,
        *,
        requested: float,
        queued: float | None = None,
        started: float | None,
        tokens: Sequence[float],
        first_text: float | None,
        ended: float,
        prompt_tokens: int,
        reused_tokens: int | None = None,
        **reported: Any,
    ) -> Metrics:
        """From stamps of one clock, in seconds.

        Args:
            requested: the request was made.
            queued: the request joined the queue, after tokenization; default: `requested`.
            started: the engine started on the request; None if it never did.
            tokens: each token.
            first_text: the first text that can be shown; None without text.
            ended: the reply ended.
            prompt_tokens: see the attribute.
            reused_tokens: see the attribute.
            reported: the attributes with defaults, as the backend reports them.
        """

        def since(stamp: float | None) -> float | None:
            return None if stamp is None else (stamp - requested) * 1000.0

        count = len(tokens)
        left_queue = ended if started is None else started
        return cls(
            prompt_tokens=prompt_tokens,
            generated_tokens=count,
            reused_tokens=reused_tokens,
            ttft_ms=since(tokens[0]) if count else None,
            first_text_ms=since(first_text),
            tpot_ms=(tokens[-1] - tokens[0]) * 1000.0 / (count - 1) if count and tokens[-1] > tokens[0] else None,
            total_ms=(ended - requested) * 1000.0,
            queue_ms=max(left_queue - (requested if queued is None else queued), 0.0) * 1000.0,
            token_times_ms=tuple((t - requested) * 1000.0 for t in tokens),
            **reported,
        )
