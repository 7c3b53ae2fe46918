"""`openvino_genai.LLMPipeline` as a backend: token ids in, token ids out.

GenAI's own chat templates, stop strings and text streaming are not used. The prompt arrives as ids, so that the
contents of the prefix cache are known id by id, and the engine decodes the generated ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.genai_options import ASSISTED_OPTIONS, unsupported_options
from ov_phi3.backends.genai_structure import obeyed_schema, unsupported_structure
from ov_phi3.backends.genai_tokenizer import genai_tokenizer_arguments
from ov_phi3.backends.longrope_graph import UnknownGraph, mark_ids, with_marked_ids
from ov_phi3.backends.protocol import BackendReport, Capabilities, Hypothesis, LoadRequest
from ov_phi3.errors import ModelError
from ov_phi3.kv.prefix_index import BlockLedger, PrefixCache
from ov_phi3.model.ir import IrSummary
from ov_phi3.system.core import import_genai, keeping_signal_stack, never_freed_in_children
from ov_phi3.system.tokenizers_library import tokenizers_importable

if TYPE_CHECKING:
    from ov_phi3.backends.protocol import Backend, Request, TokenSink
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.kv.prefix_index import PrefixIndex
    from ov_phi3.kv.sizing import KVCachePlan
    from ov_phi3.model.adapter import Adapter
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["CAPABILITIES", "LLMPipelineBackend", "LLMPipelineSpec", "with_scheduler"]

CAPABILITIES = Capabilities("llm_pipeline", caches_compiled=True)

_WHOLE_PROMPTS = 2**31 - 1  # a whole prompt in one step, as in GenAI's own latency setting


class LLMPipelineSpec:
    """`backend="llm_pipeline"` before a model is loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """What a loaded model can do."""
        return CAPABILITIES

    def resolve_properties(self, device: DeviceInfo, properties: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """The properties as they are: `LLMPipeline` has defaults of its own for the rest."""
        return dict(properties)

    def unsupported(self, config: GenerationConfig, properties: Mapping[str, Any]) -> str | None:
        """Options that GenAI lacks or would refuse while it runs, and structures that it would not obey."""
        return unsupported_options(config, _assistance(properties)) or unsupported_structure(config)

    def open(self, request: LoadRequest) -> LLMPipelineBackend:
        """Load the model.

        Raises:
            ModelError: GenAI would apply an adapter wrongly.
        """
        properties = with_scheduler(request.properties, request.kv)
        if request.adapters:
            _check_inputs(request.info.path)
            properties["adapters"] = _adapter_config(request.adapters)
        if (draft := request.draft) is not None:
            path, device = str(draft.info.path), draft.device.name
            properties["draft_model"] = import_genai().draft_model(path, device, **draft.properties)
        return LLMPipelineBackend(
            request.info.path,
            request.device.name,
            properties,
            control_ids=[token.id for token in request.info.added_tokens],
            block_size=request.kv.layout.block_size,
            rope_boundary=request.info.rope_boundary,
        )

    def fallback(self, request: LoadRequest, reason: str) -> tuple[LoadRequest, str] | None:
        """Without paged attention, where the device does not support it and nothing requires it."""
        if not request.kv.paged or request.paging_required or "ATTENTION_BACKEND" in request.properties:
            return None
        warning = (
            f"{request.device.name} did not accept paged attention ({reason}): there is no prefix cache, and every "
            "turn of a chat is prefilled whole."
        )
        stateful = replace(
            request,
            properties={**request.properties, "ATTENTION_BACKEND": "SDPA"},
            kv=replace(request.kv, paged=False),
        )
        return stateful, warning


def _assistance(properties: Mapping[str, Any]) -> str:
    """The property that turns speculative decoding on, or ""."""
    if properties.get("prompt_lookup"):
        return "prompt_lookup"
    # Do not call bool(draft_model): it crashes (openvino_genai 2026.4.1).
    return "draft_model" if "draft_model" in properties else ""


def with_scheduler(properties: Mapping[str, Any], kv: KVCachePlan) -> dict[str, Any]:
    """The properties with a `scheduler_config` for the planned cache, if the plan requires one.

    Args:
        properties: OpenVINO properties.
        kv: the planned cache.
    """
    if not kv.paged:
        return dict(properties)
    scheduler = import_genai().SchedulerConfig()
    scheduler.num_kv_blocks = kv.num_blocks
    scheduler.enable_prefix_caching = True
    scheduler.max_num_batched_tokens = _WHOLE_PROMPTS
    return {**properties, "scheduler_config": scheduler}


def _check_inputs(model_dir: Path) -> None:
    """Refuse a model whose layers read scaled inputs: GenAI multiplies an adapter's A with these (2026.4.1)."""
    if IrSummary.read(model_dir, "openvino_model").scales_inputs:
        raise ModelError(
            f"{model_dir} was exported with AWQ, which scales the inputs of layers. GenAI's adapters do not know these "
            "scales, and replies would be wrong. Take backend='infer_request', or merge the adapter: "
            "ov_phi3.export(SOURCE, DIRECTORY, adapter=...)."
        )


def _adapter_config(adapters: Sequence[tuple[Adapter, float]]) -> Any:
    """GenAI's config of adapters that stay as they are for the life of a pipeline.

    Measured on the demo model in int4 on a CPU, rank 4: 8.7 ms per token without an adapter, 11.0 ms with MODE_STATIC
    and 20.2 ms with GenAI's default, whose adapters can be changed between requests. MODE_STATIC_RANK gives wrong
    tokens there, and MODE_FUSE refuses quantised weights (openvino-genai 2026.4.1).
    """
    genai = import_genai()
    config = genai.AdapterConfig(genai.AdapterConfig.Mode.MODE_STATIC)
    for adapter, factor in adapters:
        config.add(genai.Adapter(str(adapter.weights)), factor)
    return config


class LLMPipelineBackend:
    """One `LLMPipeline`.

    With paged attention it has a prefix cache. With `ATTENTION_BACKEND="SDPA"` it has none, and every prompt is
    prefilled whole. The graph of a LongRoPE model is edited (`longrope_graph`), so that one cache serves sequences on
    both sides of the boundary.

    Args:
        model_dir: an exported model.
        device: an OpenVINO device name.
        properties: for `LLMPipeline`; a `scheduler_config` among them means paged attention.
        control_ids: tokens that are no text.
        block_size: tokens per block of the prefix cache on this device.
        rope_boundary: see `ModelInfo.rope_boundary`.

    Attributes:
        warnings: sentences about what works, but not as it should.
        draft_ms: None: GenAI loads both models together.
    """

    needs_whole_prompts = False
    kv_layout = ""

    def __init__(
        self,
        model_dir: Path,
        device: str,
        properties: Mapping[str, Any],
        *,
        control_ids: Collection[int] = (),
        block_size: int = 32,
        rope_boundary: int | None = None,
    ) -> None:
        self._genai = import_genai()
        self._assisted = _assistance(properties)
        self._model_dir, self._device, self._properties = model_dir, device, dict(properties)
        self._boundary = rope_boundary
        self._uncached: Any = None
        self._weights: Any = None
        self._converted: tuple[tuple[GenerationConfig, tuple[int, ...]], Any] | None = None
        self.warnings: list[str] = []
        self.draft_ms: float | None = None
        scheduler: Any = properties.get("scheduler_config")
        self._caches = bool(scheduler is not None and scheduler.enable_prefix_caching)
        self._contents_known = self._caches and not (scheduler.use_cache_eviction or scheduler.use_sparse_attention)
        self._marks_ids = False
        never_freed_in_children(self)
        with keeping_signal_stack(), tokenizers_importable():
            arguments = genai_tokenizer_arguments(model_dir, control_ids, can_encode="draft_model" in properties)
            self._tokenizer = self._genai.Tokenizer(*arguments)
            self._pipeline: Any = self._open()
        self._index = None
        if self._contents_known:
            self._index = BlockLedger.of(PrefixCache(block_size, int(scheduler.num_kv_blocks)))

    def _open(self) -> Any:
        """The pipeline. A LongRoPE model on paged attention gets the edited graph, or no prefix cache."""
        if self._boundary is not None and self._caches:
            xml = self._model_dir / "openvino_model.xml"
            try:
                if self._assisted:  # candidate tokens use negative ids too
                    raise UnknownGraph("with prompt lookup or a draft model")
                graph = with_marked_ids(xml, self._boundary)
            except UnknownGraph as exc:
                self._caches = self._contents_known = False
                self._properties["scheduler_config"].enable_prefix_caching = False
                self.warnings.append(
                    f"this LongRoPE model runs without a prefix cache ({exc}): every turn of a chat is prefilled whole."
                )
            else:
                self._marks_ids = True
                return self._open_edited(graph, xml.with_suffix(".bin"))
        return self._open_as_exported(self._properties)

    def _open_as_exported(self, properties: Mapping[str, Any]) -> Any:
        return self._genai.LLMPipeline(str(self._model_dir), self._tokenizer, self._device, **properties)

    def _open_edited(self, graph: str, weights: Path) -> Any:
        import openvino

        # Copy on write: OpenVINO requires a writable array, and pages that nobody writes remain the file's.
        self._weights = openvino.Tensor(np.memmap(weights, dtype=np.uint8, mode="c"), shared_memory=True)
        return self._genai.LLMPipeline(graph, self._weights, self._tokenizer, self._device, **self._properties)

    # -- the protocol ------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return CAPABILITIES

    @property
    def prefix_index(self) -> PrefixIndex | None:
        """The estimated prefix cache; None without one, and with eviction or sparse attention, whose rules differ."""
        return self._index

    def unsupported(self, config: GenerationConfig) -> str | None:
        """Options that GenAI lacks or would refuse while it runs, and structures that it would not obey."""
        return unsupported_options(config, self._assisted) or unsupported_structure(config)

    def uses_prefix_cache(self, request: Request) -> bool:
        """Whether this request uses the prefix cache."""
        return self._caches and not self._needs_plain_ids(request)

    def _needs_plain_ids(self, request: Request) -> bool:
        """Whether marked ids must be avoided: a repetition penalty reads the prompt's ids and refuses marked ones."""
        return request.long_rope and self._caches and request.config.repetition_penalty not in (None, 1.0)

    def generate(self, request: Request, sink: TokenSink) -> BackendReport:
        """Stream one reply."""
        streamer = _streamer_class()(sink)
        out = self._pipeline_for(request).generate(self._tensor(request), self._config(request), streamer)
        perf = out.perf_metrics
        tokens = perf.get_num_generated_tokens()
        return BackendReport(
            hit_limit=self._hit_limit(out, 0),
            ttft_ms=float(perf.get_ttft().mean) if tokens else None,
            tpot_ms=float(perf.get_tpot().mean) if tokens > 1 else None,
            reused_tokens=None if self.uses_prefix_cache(request) else 0,
            generated=None if self._assisted else [int(token) for token in out.tokens[0]],
        )

    def generate_n(self, request: Request) -> list[Hypothesis]:
        """Several replies at once, best first."""
        out = self._pipeline_for(request).generate(self._tensor(request), self._config(request))
        return [
            Hypothesis([int(t) for t in ids], float(score), self._hit_limit(out, i))
            for i, (ids, score) in enumerate(zip(out.tokens, out.scores, strict=True))
        ]

    def _pipeline_for(self, request: Request) -> Any:
        """The pipeline; for a request that must not use the prefix cache, a second pipeline without one.

        The second pipeline is loaded on first use and takes the memory of the model once more.
        """
        if not self._needs_plain_ids(request):
            return self._pipeline
        if self._uncached is None:
            properties = {k: v for k, v in self._properties.items() if k != "scheduler_config"}
            properties["ATTENTION_BACKEND"] = "SDPA"
            with keeping_signal_stack(), tokenizers_importable():
                self._uncached = self._open_as_exported(properties)
        return self._uncached

    def score(self, request: Request, start: int, on_progress: Callable[[int], bool], chunk: int) -> list[float]:
        """Not available: `LLMPipeline` returns no logits."""
        raise NotImplementedError

    def compute_kv(self, request: Request) -> KVEntry:
        """Not available: `LLMPipeline` gives no access to its cache."""
        raise NotImplementedError

    def fits(self, entry: KVEntry) -> bool:  # noqa: ARG002
        """False: `LLMPipeline` gives no access to its cache."""
        return False

    def import_kv(self, entry: KVEntry) -> None:
        """Not available: `LLMPipeline` gives no access to its cache."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the model."""
        with keeping_signal_stack():
            self._pipeline = self._uncached = self._weights = self._tokenizer = None

    # -- conversion --------------------------------------------------------------------------------------------------

    def _tensor(self, request: Request) -> Any:
        import openvino

        ids = request.ids
        if request.long_rope and self._marks_ids and self._boundary is not None and not self._needs_plain_ids(request):
            ids = mark_ids(ids, self._boundary)
        return openvino.Tensor(np.ascontiguousarray(ids[None, :]))

    def _config(self, request: Request) -> Any:
        """GenAI's config. The last one is kept: most requests use the same, and making it delays the first token."""
        key = (request.config, request.end_ids)
        last = self._converted
        if last is None or last[0] != key:
            self._converted = last = (key, self._convert(request))
        return last[1]

    def _convert(self, request: Request) -> Any:
        """GenAI's config without stop strings, which the engine matches, and with every end token as a stop id."""
        options: dict[str, Any] = {"stop": None, "include_stop": None}
        if isinstance(request.config.json_schema, str):
            options["json_schema"] = obeyed_schema(str(request.config.json_schema))
        config = request.config.replace(**options).to_genai()
        config.stop_token_ids = request.stop_ids
        config.eos_token_id = request.end_ids[0] if request.end_ids else -1
        if self._assisted and all(getattr(request.config, name) is None for name in ASSISTED_OPTIONS):
            config.num_assistant_tokens = 5  # GenAI's own default for prompt lookup and draft models
            config.max_ngram_size = 3
        return config

    def _hit_limit(self, out: Any, index: int) -> bool:
        reasons = out.finish_reasons
        return index < len(reasons) and reasons[index] == self._genai.GenerationFinishReason.LENGTH


@functools.cache
def _streamer_class() -> Any:
    """A StreamerBase that passes every step's ids to a `TokenSink`; made on first use, as its base needs GenAI."""
    genai = import_genai()
    running, stop = genai.StreamingStatus.RUNNING, genai.StreamingStatus.STOP

    class Streamer(genai.StreamerBase):  # type: ignore[misc, name-defined]
        def __init__(self, sink: TokenSink) -> None:
            super().__init__()
            self._sink = sink

        # An exception that leaves a callback aborts the process; a sink never raises.
        def write(self, token: int | Sequence[int]) -> Any:
            return running if self._sink(token if isinstance(token, list) else [token]) else stop  # type: ignore[list-item]

        def end(self) -> None:
            pass

    return Streamer


def _check_protocol(backend: LLMPipelineBackend) -> Backend:
    return backend  # mypy holds the class against the protocol here
