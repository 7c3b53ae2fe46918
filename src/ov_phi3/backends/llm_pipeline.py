"""`openvino_genai.LLMPipeline` as a backend: encoded ids in, ids out, nothing of its text handling used.

Its own templating, stop strings and text streaming are left off: the prompt arrives as ids, so that what is in its
prefix cache is known id by id, and text is made on this side of the callback.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.batching import Batch
from ov_phi3.backends.genai_tokenizer import genai_tokenizer_arguments
from ov_phi3.backends.graph import UnknownGraph, mark, with_marked_ids
from ov_phi3.backends.protocol import EngineReport, Hypothesis, PrefixCache
from ov_phi3.errors import ConfigError
from ov_phi3.system.core import keeping_signal_stack, never_freed_in_children

if TYPE_CHECKING:
    from ov_phi3.backends.protocol import Emit, Request
    from ov_phi3.generation.config import GenerationConfig

__all__ = ["LLMPipelineBackend"]

_ASSISTED = ("num_assistant_tokens", "assistant_confidence_threshold", "max_ngram_size")


class LLMPipelineBackend:
    """One `LLMPipeline`.

    On paged attention it has a prefix cache; with `ATTENTION_BACKEND="SDPA"` it has none, and every prompt is computed
    whole. A LongRoPE model is loaded with `graph`'s edit, so that one cache can serve both sides of the boundary.

    Args:
        model_dir: an exported model.
        device: an OpenVINO device name.
        properties: for `LLMPipeline`; a `scheduler_config` in them means paged attention.
        block_size: tokens per block of the prefix cache on this device.
        rope_boundary: see `ModelInfo.rope_boundary`.
        batches: run several requests at once, by a `ContinuousBatchingPipeline`, which is what `LLMPipeline` holds on
            paged attention. What its prefix cache then holds is not known.

    Attributes:
        doubts: what works, but not as it should; sentences.
    """

    def __init__(
        self,
        model_dir: Path,
        device: str,
        properties: Mapping[str, Any],
        *,
        block_size: int = 32,
        rope_boundary: int | None = None,
        batches: bool = False,
    ) -> None:
        import openvino_genai

        self._genai = openvino_genai
        # The truth of a draft model is not asked for: openvino_genai (2026.4.1) crashes on the question.
        self._assisted = bool(properties.get("prompt_lookup")) or "draft_model" in properties
        self._model_dir, self._device, self._properties = model_dir, device, dict(properties)
        self._boundary = rope_boundary
        self._uncached: Any = None
        self._batch: Batch | None = None
        self._weights: Any = None
        self._converted: tuple[tuple[GenerationConfig, tuple[int, ...]], Any] | None = None
        self.doubts: list[str] = []
        scheduler: Any = properties.get("scheduler_config")
        self._caches = bool(scheduler is not None and scheduler.enable_prefix_caching)
        self._rules_known = (
            self._caches and not batches and not bool(scheduler.use_cache_eviction or scheduler.use_sparse_attention)
        )
        self._block_size = block_size
        self._marks = False
        never_freed_in_children(self)
        with keeping_signal_stack():
            arguments = genai_tokenizer_arguments(model_dir, can_encode="draft_model" in properties)
            self._tokenizer = openvino_genai.Tokenizer(*arguments)
            if batches:
                self._batch = Batch(self._open_batching(), openvino_genai)
            else:
                self._pipeline: Any = self._load()

    def _load(self) -> Any:
        """The pipeline; a LongRoPE model on paged attention with its graph edited, or without a prefix cache."""
        if self._boundary is not None and self._caches:
            xml = self._model_dir / "openvino_model.xml"
            try:
                if self._assisted:  # its candidates hold ids below zero of its own
                    raise UnknownGraph("with prompt lookup or a draft model")
                graph = with_marked_ids(xml, self._boundary)
            except UnknownGraph as exc:
                self._caches = self._rules_known = False
                self._properties["scheduler_config"].enable_prefix_caching = False
                self.doubts.append(
                    f"this LongRoPE model runs without a prefix cache ({exc}): every turn of a chat is computed whole."
                )
            else:
                self._marks = True
                return self._open_edited(graph, xml.with_suffix(".bin"))
        return self._open_as_it_is(self._properties)

    def _open_batching(self) -> Any:
        properties = {k: v for k, v in self._properties.items() if k not in ("scheduler_config", "ATTENTION_BACKEND")}
        scheduler = self._properties["scheduler_config"]
        make = self._genai.ContinuousBatchingPipeline
        return make(str(self._model_dir), self._tokenizer, scheduler, self._device, **properties)

    def _open_as_it_is(self, properties: Mapping[str, Any]) -> Any:
        return self._genai.LLMPipeline(str(self._model_dir), self._tokenizer, self._device, **properties)

    def _open_edited(self, graph: str, weights: Path) -> Any:
        import openvino

        # Copy on write: OpenVINO wants an array that it may write to, and pages that nobody writes stay the file's.
        self._weights = openvino.Tensor(np.memmap(weights, dtype=np.uint8, mode="c"), shared_memory=True)
        return self._genai.LLMPipeline(graph, self._weights, self._tokenizer, self._device, **self._properties)

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The prefix cache; None without one, and with eviction or sparse attention, whose rules are others."""
        if not self._rules_known:
            return None
        return PrefixCache(self._block_size, int(self._properties["scheduler_config"].num_kv_blocks))

    def lacks(self, config: GenerationConfig) -> str | None:
        """What only a loop of our own can do."""
        own = config.own_loop()
        return None if own is None else f"{own} needs a pipeline loaded with backend='infer_request'."

    def caches(self, request: Request) -> bool:
        """Whether the prefix cache serves this request."""
        return self._caches and not self._needs_plain_ids(request)

    def _needs_plain_ids(self, request: Request) -> bool:
        """A repetition penalty reads the prompt's ids, and refuses marked ones."""
        return request.past_boundary and self._caches and request.config.repetition_penalty not in (None, 1.0)

    def generate(self, request: Request, emit: Emit) -> EngineReport:
        """Stream one reply."""
        if self._batch is not None:
            ids, limit = self._batch.generate(request, self._tensor(request), self._config(request), emit)
            return EngineReport(limit, generated=ids)
        streamer = _streamer_class()(emit)
        out = self._engine(request).generate(self._tensor(request), self._config(request), streamer)
        perf = out.perf_metrics
        tokens = perf.get_num_generated_tokens()
        return EngineReport(
            hit_limit=self._hit_limit(out, 0),
            ttft_ms=float(perf.get_ttft().mean) if tokens else None,
            tpot_ms=float(perf.get_tpot().mean) if tokens > 1 else None,
            reused_tokens=None if self.caches(request) else 0,
            generated=None if self._assisted else [int(token) for token in out.tokens[0]],
        )

    def search(self, request: Request) -> list[Hypothesis]:
        """Several replies at once, best first."""
        if self._batch is not None:
            count = request.config.num_return_sequences or 1
            return self._batch.search(self._tensor(request), self._config(request), count)
        out = self._engine(request).generate(self._tensor(request), self._config(request))
        return [
            Hypothesis([int(t) for t in ids], float(score), self._hit_limit(out, i))
            for i, (ids, score) in enumerate(zip(out.tokens, out.scores, strict=True))
        ]

    def _engine(self, request: Request) -> Any:
        """The pipeline; for a request that the prefix cache must not serve, a second one without a cache.

        It is loaded when the first such request comes, and takes the memory of the model once more.
        """
        if not self._needs_plain_ids(request):
            return self._pipeline
        if self._uncached is None:
            properties = {k: v for k, v in self._properties.items() if k != "scheduler_config"}
            properties["ATTENTION_BACKEND"] = "SDPA"
            with keeping_signal_stack():
                self._uncached = self._open_as_it_is(properties)
        return self._uncached

    def render(self, chat_template: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        """What a Jinja chat template gives, by GenAI's own interpreter; None where that cannot run it."""
        render = self._tokenizer.apply_chat_template
        history = self._genai.ChatHistory([dict(m) for m in messages])
        try:
            return str(render(history, add_generation_prompt=True, chat_template=chat_template))
        except RuntimeError:
            return None

    def close(self) -> None:
        """Free the model."""
        with keeping_signal_stack():
            self._batch = self._pipeline = self._uncached = self._weights = self._tokenizer = None

    def _tensor(self, request: Request) -> Any:
        import openvino

        ids = request.ids
        if request.past_boundary and self._marks and self._boundary is not None and not self._needs_plain_ids(request):
            ids = mark(ids, self._boundary)
        return openvino.Tensor(np.ascontiguousarray(ids[None, :]))

    def _config(self, request: Request) -> Any:
        """GenAI's config; stop strings stay with us, and all end tokens are stop tokens there.

        The last one is kept: it is the same for most requests, and making it is a part of every first token.
        """
        key = (request.config, request.end_ids)
        last = self._converted
        if last is None or last[0] != key:
            self._converted = last = (key, self._convert(request))
        return last[1]

    def _convert(self, request: Request) -> Any:
        given = [name for name in _ASSISTED if getattr(request.config, name) is not None]
        if given and not self._assisted:
            raise ConfigError(
                f"{given[0]} needs a pipeline loaded with ov_config={{'prompt_lookup': True}} (or a draft model)."
            )
        config = request.config.replace(stop=None, include_stop=None).to_genai()
        config.stop_token_ids = request.ends
        config.eos_token_id = request.end_ids[0] if request.end_ids else -1
        if self._assisted and not given:
            config.num_assistant_tokens = 5  # GenAI's own default for prompt lookup and draft models
            config.max_ngram_size = 3
        return config

    def _hit_limit(self, out: Any, index: int) -> bool:
        reasons = out.finish_reasons
        return index < len(reasons) and reasons[index] == self._genai.GenerationFinishReason.LENGTH


@functools.cache
def _streamer_class() -> Any:
    """A StreamerBase whose `write` hands every step's ids to an `Emit`; made on first use, as its base needs the
    engine.
    """
    import openvino_genai

    running = openvino_genai.StreamingStatus.RUNNING
    stop = openvino_genai.StreamingStatus.STOP

    class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, emit: Emit) -> None:
            super().__init__()
            self._emit = emit

        # An exception that leaves a callback aborts the process, hence the rule that `emit` never raises.
        def write(self, token: int | Sequence[int]) -> Any:
            return running if self._emit(token if isinstance(token, list) else [token]) else stop  # type: ignore[list-item]

        def end(self) -> None:
            pass

    return Streamer
