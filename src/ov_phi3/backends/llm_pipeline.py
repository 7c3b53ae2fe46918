"""`openvino_genai.LLMPipeline` as a backend: encoded ids in, ids out, nothing of its text handling used.

Its own templating, stop strings and text streaming are left off: the prompt arrives as ids, so that what is in its
prefix cache is known id by id, and text is made on this side of the callback.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.backends import EngineReport, Hypothesis
from ov_phi3.errors import ConfigError

if TYPE_CHECKING:
    from ov_phi3.backends import Emit, Request

__all__ = ["LLMPipelineBackend"]

_ASSISTED = ("num_assistant_tokens", "assistant_confidence_threshold", "max_ngram_size")


class LLMPipelineBackend:
    """One `LLMPipeline`. By default it runs on paged attention with prefix caching; see `ATTENTION_BACKEND`."""

    def __init__(self, model_dir: Path, device: str, properties: Mapping[str, Any]) -> None:
        import openvino_genai

        self._genai = openvino_genai
        self._assisted = bool(properties.get("prompt_lookup") or properties.get("draft_model"))
        self._pipeline: Any = openvino_genai.LLMPipeline(str(model_dir), device, **properties)

    def generate(self, request: Request, emit: Emit) -> EngineReport:
        """Stream one reply."""
        streamer = _streamer_class()(emit)
        out = self._pipeline.generate(self._tensor(request), self._config(request), streamer)
        perf = out.perf_metrics
        tokens = perf.get_num_generated_tokens()
        return EngineReport(
            hit_limit=self._hit_limit(out, 0),
            ttft_ms=float(perf.get_ttft().mean) if tokens else None,
            tpot_ms=float(perf.get_tpot().mean) if tokens > 1 else None,
        )

    def search(self, request: Request) -> list[Hypothesis]:
        """Several replies at once, best first."""
        out = self._pipeline.generate(self._tensor(request), self._config(request))
        return [
            Hypothesis([int(t) for t in ids], float(score), self._hit_limit(out, i))
            for i, (ids, score) in enumerate(zip(out.tokens, out.scores, strict=True))
        ]

    def render(self, chat_template: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        """What a Jinja chat template gives, by GenAI's own interpreter; None where that cannot run it."""
        tokenizer = self._pipeline.get_tokenizer()
        history = self._genai.ChatHistory([dict(m) for m in messages])
        try:
            return str(tokenizer.apply_chat_template(history, add_generation_prompt=True, chat_template=chat_template))
        except RuntimeError:
            return None

    def close(self) -> None:
        """Free the model."""
        self._pipeline = None

    def _tensor(self, request: Request) -> Any:
        import openvino

        return openvino.Tensor(request.ids[None, :])

    def _config(self, request: Request) -> Any:
        """GenAI's config; stop strings stay with us, and all end tokens are stop tokens there."""
        given = [name for name in _ASSISTED if getattr(request.config, name) is not None]
        if given and not self._assisted:
            raise ConfigError(
                f"{given[0]} needs a pipeline loaded with ov_config={{'prompt_lookup': True}} (or a draft model)."
            )
        config = request.config.replace(stop=None, include_stop=None).to_genai()
        ends = set() if request.config.ignore_eos else set(request.end_ids)
        config.stop_token_ids = ends | set(request.config.stop_token_ids or ())
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
