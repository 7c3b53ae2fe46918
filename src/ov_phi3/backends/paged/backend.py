"""`backend="infer_request"`: our own engine behind the protocol of all backends."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.paged.beam import BeamGroup
from ov_phi3.backends.paged.constraint import ConstraintCompiler
from ov_phi3.backends.paged.draft_model import DraftModel, DraftSequence, ModelDrafter
from ov_phi3.backends.paged.engine import PagedEngine
from ov_phi3.backends.paged.group import PrefillGroup, ReplyGroup, SampleGroup, ScoreGroup
from ov_phi3.backends.paged.lookup import LookupDrafter
from ov_phi3.backends.paged.model_runner import SCRATCH_BLOCKS, ModelRunner
from ov_phi3.backends.paged.step_costs import MeasuredCosts
from ov_phi3.backends.protocol import BackendReport, Cancelled, Capabilities, Hypothesis
from ov_phi3.backends.words import TokenTexts
from ov_phi3.errors import ConfigError, GenerationError
from ov_phi3.system.core import never_freed_in_children

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.drafter import Drafter
    from ov_phi3.backends.protocol import Backend, LoadRequest, Request, TokenSink
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["CAPABILITIES", "PagedBackend", "PagedBackendSpec"]

CAPABILITIES = Capabilities(
    "infer_request",
    saves_kv=True,
    scores=True,
    cancels_within_pass=True,
    schedules=True,
    plans_drafts=True,
)

_LOOKUP_TOKENS, _LOOKUP_NGRAM = 5, 3  # GenAI's own defaults for prompt lookup
_FOREIGN = "belongs to backend='llm_pipeline'; leave it out or use that."
_FOREIGN_PROPERTIES = ("draft_model", "extensions", "scheduler_config")
_FIRST_TOKENS = 1024  # of a cache that grows
_GPU_CHUNK = 1024


class PagedBackendSpec:
    """`backend="infer_request"` before a model is loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """What a loaded model can do."""
        return CAPABILITIES

    def resolve_properties(self, device: DeviceInfo, properties: Mapping[str, Any]) -> dict[str, Any]:
        """The properties as they are, if they are for a compiled model.

        Raises:
            ConfigError: a property of `LLMPipeline`, or a device without paged attention.
        """
        if device.kind == "NPU":
            raise ConfigError(f"backend='infer_request' runs on CPUs and GPUs, not on {device.name}.")
        for key in _FOREIGN_PROPERTIES:
            if key in properties:
                raise ConfigError(f"ov_config[{key!r}] {_FOREIGN}")
        attention = str(properties.get("ATTENTION_BACKEND", "PA")).upper()
        if attention != "PA":
            raise ConfigError(f"ATTENTION_BACKEND={attention} {_FOREIGN}")
        return {key: value for key, value in properties.items() if key != "ATTENTION_BACKEND"}

    def unsupported(self, config: GenerationConfig, properties: Mapping[str, Any]) -> str | None:  # noqa: ARG002
        """A confidence of drafts."""
        if config.assistant_confidence_threshold is None:
            return None
        return (
            "assistant_confidence_threshold is for a draft model on backend='llm_pipeline'; speculation='auto' "
            "chooses the number of drafts here."
        )

    def open(self, request: LoadRequest) -> PagedBackend:
        """Load the model."""
        return PagedBackend(request)

    def fallback(self, request: LoadRequest, reason: str) -> None:  # noqa: ARG002
        """None."""
        return


class PagedBackend:
    """One model on our own engine.

    Args:
        request: what to load.

    Attributes:
        warnings: sentences about what works, but not as it should.
        draft_ms: what loading the draft model took, in milliseconds; None without one.
    """

    needs_whole_prompts = False
    block_size = 1  # of the prefix index: matches are exact to the token
    growable = True

    def __init__(self, request: LoadRequest) -> None:
        never_freed_in_children(self)
        self.warnings: list[str] = []
        self._tokenizer = request.tokenizer
        self._vocab_size, self._end_ids = request.info.vocab_size, request.info.eos_token_ids
        self._prompt_lookup = bool(request.properties.get("prompt_lookup", False))
        self._runner, self._boundary, most = _open_runner(request)
        self._costs = MeasuredCosts(self._runner.time_rows)  # for the engine's thread between two passes
        self._capacity = (max(most, self._runner.pool.num_blocks) - SCRATCH_BLOCKS) * self._runner.block_size
        chunk = _chunk(request)
        self._engine = PagedEngine(self._runner, rope_boundary=self._boundary, chunk=chunk, max_blocks=most)
        self._draft: DraftModel | None = None
        self.draft_ms: float | None = None
        if request.draft is not None:
            began = time.perf_counter()
            try:
                self._draft = _open_draft(request.draft, self._vocab_size, chunk)
                self.draft_ms = (time.perf_counter() - began) * 1000.0
            except BaseException:
                self._engine.close()
                raise

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return CAPABILITIES

    @property
    def kv_layout(self) -> str:
        """How the blocks of its cache lie in memory."""
        return self._runner.kv_layout

    def unsupported(self, config: GenerationConfig) -> str | None:
        """A confidence of drafts; a structure that cannot be compiled."""
        if (problem := PagedBackendSpec().unsupported(config, {})) is not None:
            return problem
        try:
            self._constraints.start(config)
        except ConfigError as exc:
            return str(exc)
        return None

    @functools.cached_property
    def _constraints(self) -> ConstraintCompiler:
        if self._tokenizer is None:
            raise ConfigError("structured output needs the tokenizer that load() opens.")
        return ConstraintCompiler(self._tokenizer.result(), self._end_ids, self._vocab_size)

    def uses_prefix_cache(self, request: Request) -> bool:  # noqa: ARG002
        """Always."""
        return True

    # -- the prefix index --------------------------------------------------------------------------------------------

    @property
    def prefix_index(self) -> PagedBackend:
        """Itself: the contents of the cache are known exactly."""
        return self

    @property
    def capacity(self) -> int:
        """Number of tokens that the cache has room for."""
        return self._capacity

    def match(self, ids: NDArray[np.int64], namespace: bytes = b"", *, isolated: bool = False) -> int:  # noqa: ARG002
        """Prompt tokens that are cached, without the last one. Which side of LongRoPE follows from their number."""
        return self._engine.match(ids, isolated=isolated)

    def commit(self, *_: object, **__: object) -> None:
        """Nothing: the block manager records the contents."""

    def invalidate(self) -> None:
        """Nothing: after a failure the engine gives up the blocks itself."""

    # -- requests ----------------------------------------------------------------------------------------------------

    def generate(self, request: Request, sink: TokenSink) -> BackendReport:
        """Stream one reply."""
        request = self._with_texts(request)
        config = request.config
        group = ReplyGroup(request, sink, self._boundary, self._constraints.start(config), self._drafter(request))
        self._engine.run(group)
        return group.report()

    def _drafter(self, request: Request) -> Drafter | None:
        """A drafter for a reply; None if it is to have none."""
        config, ids = request.config, request.ids.tolist()
        number = config.num_assistant_tokens or (_LOOKUP_TOKENS if self._prompt_lookup else None)
        draft = self._draft if config.max_ngram_size is None else None
        if config.speculation != "auto" and number is None:
            return None
        if draft is not None and (config.speculation == "auto" or config.num_assistant_tokens):
            lookup, sequence = LookupDrafter(ids, self._costs), DraftSequence(draft, request)
            return ModelDrafter(
                sequence, lookup, draft, self._costs, self._runs_one_sequence, config.num_assistant_tokens
            )
        if config.speculation == "auto":
            return LookupDrafter(ids, self._costs)
        return LookupDrafter(ids, self._costs, number, range(config.max_ngram_size or _LOOKUP_NGRAM, 0, -1))

    def _runs_one_sequence(self) -> bool:
        return self._engine.num_sequences == 1

    def _with_texts(self, request: Request) -> Request:
        config = request.config
        return replace(request, texts=self._texts) if config.bad_words or config.dry_multiplier else request

    @functools.cached_property
    def _texts(self) -> TokenTexts:
        if self._tokenizer is None:
            raise ConfigError("bad_words and DRY need the tokenizer that load() opens.")
        tokenizer = self._tokenizer.result()
        return TokenTexts(tokenizer.token_bytes, tokenizer.special_ids, self._vocab_size)

    def generate_n(self, request: Request) -> list[Hypothesis]:
        """Beams, or samples, of one prompt, which is computed once."""
        group: BeamGroup | SampleGroup
        request = self._with_texts(request)
        if (request.config.num_beams or 1) > 1:
            group = BeamGroup(request, self._boundary)
        else:
            constraint = self._constraints.start(request.config)
            group = SampleGroup(request, self._boundary, constraint, lambda: self._drafter(request))
        self._engine.run(group)
        return group.hypotheses()

    def score(self, request: Request, start: int, on_progress: Callable[[int], bool], chunk: int) -> list[float]:  # noqa: ARG002
        """Log-probabilities of the request's ids from `start` on, each given all ids before it."""
        total = len(request.ids)
        group = ScoreGroup(
            replace(request, on_progress=lambda done, _: on_progress(min(done, total))), start, self._boundary
        )
        try:
            self._engine.run(group)
        except Cancelled:
            return []
        return group.logprobs

    def compute_kv(self, request: Request) -> KVEntry:
        """The keys and values of the request's ids, those that are not cached computed first."""
        group = PrefillGroup(request, self._boundary)
        self._engine.run(group)
        if group.entry is None:
            raise GenerationError("the engine no longer has the keys and values that it just computed.")
        return group.entry

    def fits(self, entry: KVEntry) -> bool:
        """Whether an entry of the same `kv_layout` has all blocks that its ids need, in the sizes of this cache."""
        sizes = [port.block_bytes for port in self._runner.ports]
        blocks = -(-len(entry.ids) // self._runner.block_size)
        return [array.shape[1] for array in entry.tensors.arrays] == sizes and entry.tensors.blocks >= blocks

    def import_kv(self, entry: KVEntry) -> None:
        """Let requests start from an entry for as long as it is referenced elsewhere."""
        self._engine.add_entry(entry)

    def close(self) -> None:
        """Free the model, and its draft model."""
        self._engine.close()
        if self._draft is not None:
            self._draft.close()


def _check_protocol(backend: PagedBackend) -> Backend:
    return backend  # mypy holds the class against the protocol here


def _open_runner(request: LoadRequest) -> tuple[ModelRunner, int | None, int]:
    """A compiled model, the LongRoPE boundary of its sequences, and the blocks that its cache may grow to."""
    info, kv = request.info, request.kv
    boundary = info.rope_boundary
    boundary = boundary if boundary is not None and boundary < kv.context_length else None
    runner = ModelRunner(
        info.path,
        request.device.name,
        {key: value for key, value in request.properties.items() if key != "prompt_lookup"},
        num_blocks=lambda size, block_bytes: _first_blocks(request, size, block_bytes),
        rope_boundary=boundary,
        adapters=request.adapters,
    )
    conversation = -(-kv.context_length // runner.block_size) + 1
    return runner, boundary, 0 if kv.num_blocks else SCRATCH_BLOCKS + request.concurrency * conversation


def _open_draft(request: LoadRequest, vocab_size: int, chunk: int) -> DraftModel:
    """The draft model of a model with this vocabulary."""
    runner, boundary, most = _open_runner(request)
    return DraftModel(
        runner,
        vocab_size=min(vocab_size, request.info.vocab_size),
        context_length=request.kv.context_length,
        rope_boundary=boundary,
        chunk=chunk,
        max_blocks=most,
    )


def _chunk(request: LoadRequest) -> int:
    """Most prefill tokens of a pass; 0 for any number. A GPU cannot cancel a pass, so a long prompt needs chunks."""
    return request.max_step_tokens or (_GPU_CHUNK if request.device.kind == "GPU" else 0)


def _first_blocks(request: LoadRequest, block_size: int, block_bytes: int) -> int:
    """Blocks to allocate at load, the scratch block included.

    The plan estimates the size of a block. The compiled model knows it, and a budget in bytes holds by that.
    """
    kv = request.kv
    if not kv.num_blocks:
        tokens = min(_FIRST_TOKENS, kv.context_length * request.concurrency)
        return SCRATCH_BLOCKS + -(-tokens // block_size)
    budget = kv.num_blocks * kv.layout.block_bytes(request.info)
    return max(SCRATCH_BLOCKS + 1, budget // block_bytes)
