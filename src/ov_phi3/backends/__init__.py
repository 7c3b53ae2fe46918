"""Engines that turn token ids into token ids, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ov_phi3.generation_config import GenerationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BACKENDS", "Backend", "Emit", "EngineReport", "Hypothesis", "Request"]

BACKENDS = ("llm_pipeline",)
"""Names that `load(backend=...)` takes."""

Emit = Callable[[Sequence[int]], bool]
"""Called by an engine with each step's new ids, one or several; False asks it to stop. Never raises."""


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is asked for.

    Attributes:
        ids: the prompt, int64, shape [tokens].
        config: fully resolved.
        end_ids: ids that end the reply.
    """

    ids: NDArray[np.int64]
    config: GenerationConfig
    end_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What an engine says about a reply that it streamed.

    Attributes:
        hit_limit: it ended at its length limit.
        ttft_ms: the engine's own time to first token, in milliseconds, or None.
        tpot_ms: the engine's own mean time per further token, in milliseconds, or None.
        reused_tokens: prompt tokens found in the cache, or None where the engine does not tell.
    """

    hit_limit: bool
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    reused_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One of several replies: its ids, and the engine's score (log-probability, normalised as the engine does)."""

    ids: list[int]
    score: float
    hit_limit: bool


class Backend(Protocol):
    """One engine with one model loaded. Called from one thread at a time."""

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
