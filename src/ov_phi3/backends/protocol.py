"""Engines that turn token ids into token ids, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ov_phi3.generation.config import GenerationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.generation.results import TokenLogprob

__all__ = [
    "BACKENDS",
    "Backend",
    "CallbackFailed",
    "Cancelled",
    "Emit",
    "EngineReport",
    "Hypothesis",
    "PrefixCache",
    "Request",
]

BACKENDS = ("llm_pipeline", "infer_request")
"""Names that `load(backend=...)` takes."""


class CallbackFailed(Exception):  # noqa: N818 - what failed is its cause
    """A callback of the caller's raised; what it raised is the `__cause__`, and is what the caller gets."""


class Cancelled(Exception):  # noqa: N818 - not a failure
    """The prefill was stopped, between two pieces or within one."""


class Emit(Protocol):
    """Called by an engine with each step's new ids, one or several, and where they were asked for their
    log-probabilities; False asks it to stop. Never raises.
    """

    def __call__(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = (), /) -> bool: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is asked for.

    Attributes:
        ids: the prompt, int64, shape [tokens].
        config: fully resolved.
        end_ids: ids that end the reply.
        past_boundary: the sequence is past the LongRoPE boundary, so that no keys of a shorter one may serve it.
        alone: take nothing from what earlier requests left in the cache, so that the arithmetic is the same whatever
            ran before; for an engine whose cache is known token by token.
        keep: the conversation may go on, so that what is cached of it is worth keeping whole.
        wanted: asked now and then during a long pass; an engine that can stop within one does so when it says False.
    """

    ids: NDArray[np.int64]
    config: GenerationConfig
    end_ids: tuple[int, ...]
    past_boundary: bool = False
    alone: bool = False
    keep: bool = False
    wanted: Callable[[], bool] | None = None

    @property
    def ends(self) -> set[int]:
        """Every id that ends the reply: those asked for, and the model's own unless they are to be ignored."""
        return {*(self.config.stop_token_ids or ()), *(() if self.config.ignore_eos else self.end_ids)}


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What an engine says about a reply that it streamed.

    Attributes:
        hit_limit: it ended at its length limit.
        ttft_ms: the engine's own time to first token, in milliseconds, or None.
        tpot_ms: the engine's own mean time per further token, in milliseconds, or None.
        reused_tokens: prompt tokens found in the cache, or None where that cannot be known.
        recomputed_tokens: tokens computed a second time, as the reply grew past the LongRoPE boundary.
        generated: every id that the engine generated, with those behind a stop that nobody saw; None where it does not
            tell, or computed others besides.
    """

    hit_limit: bool
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    reused_tokens: int | None = None
    recomputed_tokens: int = 0
    generated: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """An engine's prefix cache, as `BlockLedger` keeps its books.

    Attributes:
        block_size: tokens per block.
        num_blocks: places; 0 for a cache that grows.
    """

    block_size: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One of several replies: its ids, and the engine's score (log-probability, normalised as the engine does)."""

    ids: list[int]
    score: float
    hit_limit: bool


class Backend(Protocol):
    """One engine with one model loaded. Called from one thread at a time."""

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """Its prefix cache; None where it has none, or one whose rules are not known."""
        ...

    def lacks(self, config: GenerationConfig) -> str | None:
        """What in a config this engine cannot do, as a sentence with what to do; None where it can all of it."""
        ...

    def caches(self, request: Request) -> bool:
        """Whether this request uses the prefix cache."""
        ...

    def generate(self, request: Request, emit: Emit) -> EngineReport:
        """Stream one reply; returns when it has ended or `emit` said False."""
        ...

    def search(self, request: Request) -> list[Hypothesis]:
        """Several replies at once (beam search, or several samples), best first; not streamed."""
        ...

    def render(self, chat_template: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        """What a Jinja chat template gives for messages and a generation prompt; None where the engine cannot run
        it.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...
