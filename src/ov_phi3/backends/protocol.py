"""The protocol between the engine and what runs the model: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.backends.words import TokenTexts
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.generation.results import TokenLogprob
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.kv.prefix_index import PrefixIndex
    from ov_phi3.kv.sizing import KVCachePlan
    from ov_phi3.model.adapter import Adapter
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.system.devices import DeviceInfo
    from ov_phi3.text.stop_strings import StopWatch
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendName",
    "BackendReport",
    "BackendSpec",
    "CallbackFailed",
    "Cancelled",
    "Capabilities",
    "EngineReport",
    "Hypothesis",
    "LoadRequest",
    "Request",
    "TokenSink",
]

BackendName: TypeAlias = Literal["llm_pipeline", "infer_request"]
"""What runs a model, see `load`; `backends/registry.py` maps the names to their specifications."""

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
"""Names that `load(backend=...)` accepts."""


class CallbackFailed(Exception):  # noqa: N818 - the failure is its cause
    """A callback of the caller raised; that exception is the `__cause__`, and is raised to the caller."""


class Cancelled(Exception):  # noqa: N818 - not a failure
    """A prefill was stopped, between two chunks or within one."""


class TokenSink(Protocol):
    """Receives the ids of each step, one or several, and their log-probabilities where requested.

    Returns False to stop the reply. Must not raise.
    """

    def __call__(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = (), /) -> bool: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, known before a model is loaded.

    Attributes:
        name: the backend's name, as in `load(backend=...)`.
        saves_kv: `compute_kv` and `import_kv` work: keys and values can be read and written.
        scores: `score` works.
        cancels_within_pass: a running pass can be cancelled, so that long prompts need no chunks.
        schedules: it runs several requests at once, and prefills and crosses the LongRoPE boundary by itself, so that
            the runner only hands requests on.
        caches_compiled: OpenVINO's compile cache (CACHE_DIR) works with it.
        plans_drafts: it decides at every step how many tokens are drafted (`speculation="auto"`).
    """

    name: str
    saves_kv: bool = False
    scores: bool = False
    cancels_within_pass: bool = False
    schedules: bool = False
    caches_compiled: bool = False
    plans_drafts: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One request to a backend.

    Attributes:
        ids: the prompt, int64, shape [tokens].
        config: the options, fully resolved.
        end_ids: the model's own end tokens.
        long_rope: the sequence is past the LongRoPE boundary; keys of a shorter sequence must not be reused.
        isolated: do not reuse cached KV, so that a seeded request is reproducible; for backends whose cache is known
            token by token.
        most_reused: most prompt tokens taken from the cache, so that a seeded turn of a chat computes the same tokens
            whatever ran before; None for any number. For backends whose cache is known token by token.
        should_continue: called now and then during a long pass; False stops the pass where the backend can do so.
        on_progress: receives the number of prefilled prompt tokens and their total; returns False to stop. For
            backends that schedule their own prefill.
        stop_watch: finds the stop strings of a reply; each of several sequences forks it. None without stop strings. A
            streamed reply is stopped by its sink.
        streamed: the caller reads the tokens as they come, so a step should not hold them up for long.
        texts: the vocabulary, for options that depend on what tokens say; the backend adds it.
    """

    ids: NDArray[np.int64]
    config: GenerationConfig
    end_ids: tuple[int, ...]
    long_rope: bool = False
    isolated: bool = False
    most_reused: int | None = None
    should_continue: Callable[[], bool] | None = None
    on_progress: Callable[[int, int], bool] | None = None
    stop_watch: StopWatch | None = None
    streamed: bool = True
    texts: TokenTexts | None = None

    @property
    def stop_ids(self) -> set[int]:
        """Every id that ends the reply: the requested ones, and the model's own unless `ignore_eos` is set."""
        return {*(self.config.stop_token_ids or ()), *(() if self.config.ignore_eos else self.end_ids)}


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What a backend reports about a streamed reply.

    Attributes:
        hit_limit: the reply ended at its length limit.
        ttft_ms: time to first token by the backend's own clock, in milliseconds, or None.
        tpot_ms: mean time per further token by the backend's own clock, in milliseconds, or None.
        reused_tokens: prompt tokens found in the cache, or None if unknown.
        recomputed_tokens: tokens computed a second time because the reply crossed the LongRoPE boundary.
        generated: every id that the backend generated, including ids behind a stop that were not delivered; None if
            the backend does not report them, or computed other ids as well.
        in_loop: the reply ended by `stop_on_loop`.
        steps: passes that gave tokens of the reply; None if unknown.
        drafted_tokens: draft tokens that were computed; None if unknown.
        accepted_tokens: of these, the ones that the reply has; None if unknown.
        forced_tokens: tokens that took no pass of their own because a structure allowed no other; None if unknown.
    """

    hit_limit: bool
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    reused_tokens: int | None = None
    recomputed_tokens: int = 0
    generated: Sequence[int] | None = None
    in_loop: bool = False
    steps: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    forced_tokens: int | None = None


EngineReport = BackendReport
"""Former name of `BackendReport`."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One of several replies to a prompt.

    Attributes:
        ids: its token ids.
        score: log-probability, normalised by the backend's own rule.
        hit_limit: it ended at its length limit.
        in_loop: it ended by `stop_on_loop`.
    """

    ids: list[int]
    score: float
    hit_limit: bool
    in_loop: bool = False


class Backend(Protocol):
    """One model loaded into one inference engine. Called from one thread at a time unless it schedules.

    Attributes:
        warnings: sentences about what works, but not as it should.
        draft_ms: what loading the draft model took, in milliseconds; None without one, or if it is unknown.
    """

    warnings: list[str]
    draft_ms: float | None

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        ...

    @property
    def prefix_index(self) -> PrefixIndex | None:
        """Index of its prefix cache; None without a cache, or if the cache's contents cannot be known."""
        ...

    @property
    def needs_whole_prompts(self) -> bool:
        """Whether every prompt must be prefilled in one pass."""
        ...

    def unsupported(self, config: GenerationConfig) -> str | None:
        """The first option that it does not support, as a sentence that says what to do; None if it supports all."""
        ...

    def uses_prefix_cache(self, request: Request) -> bool:
        """Whether this request reads and fills the prefix cache."""
        ...

    def generate(self, request: Request, sink: TokenSink) -> BackendReport:
        """Stream one reply; returns when it has ended or the sink has returned False."""
        ...

    def generate_n(self, request: Request) -> list[Hypothesis]:
        """Several replies (beam search or samples), best first, not streamed; empty if stopped before the first one."""
        ...

    def score(self, request: Request, start: int, on_progress: Callable[[int], bool], chunk: int) -> list[float]:
        """Log-probabilities of the request's ids from `start` on, each given all ids before it.

        Args:
            request: the ids to score.
            start: index of the first scored id, at least 1.
            on_progress: receives the number of computed tokens; returns False to stop.
            chunk: tokens per pass of the part before `start`; 0 for one pass.
        """
        ...

    @property
    def kv_layout(self) -> str:
        """How the blocks of its cache lie in memory, as text; "" if they cannot be read."""
        ...

    def fits(self, entry: KVEntry) -> bool:
        """Whether an entry of the same `kv_layout` has all blocks that its ids need, in the sizes of this cache."""
        ...

    def compute_kv(self, request: Request) -> KVEntry:
        """A copy of the keys and values of the request's ids; those that are not cached are computed first."""
        ...

    def import_kv(self, entry: KVEntry) -> None:
        """Let requests reuse an entry for as long as it is referenced elsewhere."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True)
class LoadRequest:
    """What to load, and how.

    Attributes:
        info: the model.
        device: the device.
        properties: OpenVINO properties, complete and checked.
        kv: planned size of the KV cache.
        concurrency: requests that run at once; above 1 only for a backend that schedules.
        max_step_tokens: prompt tokens that a step of a backend that schedules may compute; 0 for any number.
        tokenizer: the model's tokenizer, which is opened at the same time.
        adapters: LoRA adapters, each with the factor of its B A.
        paging_required: paged attention must not be given up, since the cache's size depends on it.
        draft: a model with the same vocabulary that drafts tokens; None for none.
    """

    info: ModelInfo
    device: DeviceInfo
    properties: Mapping[str, Any]
    kv: KVCachePlan
    concurrency: int = 1
    max_step_tokens: int = 0
    paging_required: bool = False
    tokenizer: Future[Tokenizer] | None = None
    adapters: tuple[tuple[Adapter, float], ...] = ()
    draft: LoadRequest | None = None


class BackendSpec(Protocol):
    """A backend before a model is loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """What a loaded model of this backend can do."""
        ...

    def resolve_properties(self, device: DeviceInfo, properties: Mapping[str, Any]) -> dict[str, Any]:
        """The properties with this backend's own defaults.

        Raises:
            ConfigError: a property or device that this backend does not support.
        """
        ...

    def unsupported(self, config: GenerationConfig, properties: Mapping[str, Any]) -> str | None:
        """As `Backend.unsupported`, as far as it is known before a model is loaded with these properties."""
        ...

    def open(self, request: LoadRequest) -> Backend:
        """Load the model."""
        ...

    def fallback(self, request: LoadRequest, reason: str) -> tuple[LoadRequest, str] | None:
        """Another way to load after a failure, and a warning about it; None if there is none."""
        ...
