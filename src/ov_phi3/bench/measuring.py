"""Measure a pipeline: prompts of exact lengths with fresh content, warm-up apart, every sample kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from ov_phi3.bench.prompts import chat_message, random_prompt
from ov_phi3.bench.report import Report
from ov_phi3.bench.roofline import Roofline
from ov_phi3.bench.samples import ChatTurn, Measurement
from ov_phi3.checks import whole_number
from ov_phi3.errors import ConfigError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.metrics import Metrics
from ov_phi3.system.machine import Machine
from ov_phi3.system.memory import peak_memory_bytes, resident_memory_bytes

if TYPE_CHECKING:
    from ov_phi3.generation.results import GenerationResult
    from ov_phi3.pipeline import Pipeline

__all__ = ["Plan", "check_plan", "measure"]

_SYSTEM_MESSAGE_WORDS = 40
_CHAT_REPLY_TOKENS = 32
_WARM_UP_REPLIES = 1


def measure(
    pipe: Pipeline,
    *,
    prompt_tokens: int | Sequence[int] = (32, 256),
    new_tokens: int = 64,
    repeat: int = 5,
    ends: Literal["forced", "natural"] = "forced",
    chat_turns: int = 0,
    roofline: bool = True,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> Report:
    """Measure time to first token and time per output token of greedy replies to prompts of exact lengths.

    Every prompt has fresh random content of ordinary tokens, so no prefix cache shortens the time to first token;
    `Measurement.cached_tokens` proves it. The first reply of each prompt length is discarded: OpenVINO chooses kernels
    per shape, and the first use of a shape pays for that. The lengths alternate, so that a drift of the machine's speed
    affects all lengths alike.

    Args:
        pipe: a loaded pipeline. The cost of the first inference is reported too if the pipeline is unused.
        prompt_tokens: prompt lengths; may be empty if only a chat is measured.
        new_tokens: tokens per reply.
        repeat: replies per prompt length, and number of conversations.
        ends: "forced": every reply has `new_tokens` tokens; "natural": replies end at end tokens.
        chat_turns: turns of a conversation to measure too, with short messages and replies of 32 tokens; 0 for none.
        roofline: measure the memory bandwidth and report the fraction in use; takes 256 MiB and a second.
        seed: seed of the prompts' content.
        progress: called with a short text before each step.

    Raises:
        ConfigError: a length or count out of range, or an unknown value of `ends`.
        ContextOverflowError: prompt and reply do not fit the context window.
        TypeError: a length or count that is not a whole number.
    """
    lengths = [prompt_tokens] if isinstance(prompt_tokens, int) else prompt_tokens
    plan = check_plan(lengths, new_tokens, repeat, ends, chat_turns, seed)
    _check_room(pipe, plan)
    results = _run(pipe, plan, roofline, progress or (lambda _: None))
    return _report(pipe, plan, results)


@dataclass(frozen=True)
class Plan:
    """The checked arguments of `measure` that define the measured replies."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    repeat: int
    ends: str
    chat_turns: int
    seed: int


def check_plan(
    prompt_tokens: Sequence[int], new_tokens: int, repeat: int, ends: str, chat_turns: int, seed: int
) -> Plan:
    """Check the arguments of `measure`, which need no model.

    Raises:
        ConfigError, TypeError: see `measure`.
    """
    if ends not in ("forced", "natural"):
        raise ConfigError(f"ends={ends!r}; expected 'forced' or 'natural'.")
    return Plan(
        prompt_tokens=tuple(whole_number("prompt_tokens", length, "tokens", least=1) for length in prompt_tokens),
        new_tokens=whole_number("new_tokens", new_tokens, "tokens", least=1),
        repeat=whole_number("repeat", repeat, least=1),
        ends=ends,
        chat_turns=whole_number("chat_turns", chat_turns, least=0),
        seed=seed,
    )


def _check_room(pipe: Pipeline, plan: Plan) -> None:
    """Refuse lengths that do not fit the context window, before minutes of measuring."""
    config = GenerationConfig(max_new_tokens=plan.new_tokens)
    for length in plan.prompt_tokens:
        pipe.engine.check_room(config, length)


@dataclass(frozen=True)
class _Results:
    """The results of a measurement, in the order in which they are taken."""

    first_inference_ms: float | None
    warm_inference_ms: float
    loaded_memory_bytes: int | None
    replies: list[list[GenerationResult]]
    chat: tuple[ChatTurn, ...]
    peak_memory_bytes: int | None
    roofline: Roofline | None


def _run(pipe: Pipeline, plan: Plan, roofline: bool, show: Callable[[str], object]) -> _Results:
    """Take all measurements of a plan."""
    unused = pipe.unused
    show("first inference")
    first_ms, warm_ms = pipe.warmup(), pipe.warmup()
    loaded_memory = resident_memory_bytes()
    rng = random.Random(plan.seed)
    replies = _measure_replies(pipe, plan, rng, show)
    chat = _measure_chat(pipe, plan, rng, show)
    peak_memory = peak_memory_bytes()
    limit = _measure_roofline(pipe, show) if roofline else None  # last, as it takes memory of its own
    return _Results(first_ms if unused else None, warm_ms, loaded_memory, replies, chat, peak_memory, limit)


def _measure_replies(
    pipe: Pipeline, plan: Plan, rng: random.Random, show: Callable[[str], object]
) -> list[list[GenerationResult]]:
    """Measure `plan.repeat` replies of each prompt length, after a warm-up reply of each that is discarded."""
    replies: list[list[GenerationResult]] = [[] for _ in plan.prompt_tokens]
    for number in range(_WARM_UP_REPLIES + plan.repeat):
        for results, length in zip(replies, plan.prompt_tokens, strict=True):
            show(f"{length} prompt tokens, " + (f"reply {number} of {plan.repeat}" if number else "warm-up"))
            prompt = random_prompt(pipe, length, rng)
            forced = plan.ends == "forced"
            result = pipe.generate(prompt, max_new_tokens=plan.new_tokens, ignore_eos=forced, do_sample=False)
            if number >= _WARM_UP_REPLIES:
                results.append(result)
    return replies


def _measure_chat(
    pipe: Pipeline, plan: Plan, rng: random.Random, show: Callable[[str], object]
) -> tuple[ChatTurn, ...]:
    """Measure conversations whose messages and replies have equal lengths and fresh content; the first is discarded."""
    if not plan.chat_turns:
        return ()
    turns: list[list[Metrics]] = [[] for _ in range(plan.chat_turns)]
    for number in range(_WARM_UP_REPLIES + plan.repeat):
        chat = pipe.chat(system=chat_message(rng, _SYSTEM_MESSAGE_WORDS))
        for samples in turns:
            conversation = f"conversation {number} of {plan.repeat}" if number else "warm-up"
            show(f"chat of {plan.chat_turns} turns, {conversation}")
            message = chat_message(rng)
            result = chat.send(message, max_new_tokens=_CHAT_REPLY_TOKENS, ignore_eos=True, do_sample=False)
            if number >= _WARM_UP_REPLIES:
                samples.append(result.metrics)
    return tuple(ChatTurn(tuple(samples), turn) for turn, samples in enumerate(turns, start=1))


def _measure_roofline(pipe: Pipeline, show: Callable[[str], object]) -> Roofline:
    show("memory bandwidth")
    return Roofline.measure(pipe.info, pipe.device.name, pipe.load_report.ov_config)


def _measurement(
    prompt_tokens: int, plan: Plan, results: Sequence[GenerationResult], limit: Roofline | None
) -> Measurement:
    measurement = Measurement(
        samples=tuple(result.metrics for result in results),
        prompt_tokens=prompt_tokens,
        new_tokens=plan.new_tokens,
        finish_reasons=tuple(result.finish_reason for result in results),
    )
    if limit is None or measurement.tpot_ms is None:
        return measurement
    # The cache grows by a token per step: on average it holds the prompt and half of the reply.
    reply_tokens = median(s.generated_tokens for s in measurement.samples)
    fraction = limit.fraction(measurement.tpot_ms, prompt_tokens + reply_tokens / 2)
    return replace(measurement, roofline_fraction=fraction)


def _report(pipe: Pipeline, plan: Plan, results: _Results) -> Report:
    """The results with all that they depend on."""
    return Report(
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=Machine.here(),
        device=asdict(pipe.device),
        model=_model_facts(pipe),
        settings=_settings(pipe, plan),
        load_ms=_load_ms(pipe),
        first_inference_ms=results.first_inference_ms,
        warm_inference_ms=results.warm_inference_ms,
        measurements=tuple(
            _measurement(length, plan, replies, results.roofline)
            for length, replies in zip(plan.prompt_tokens, results.replies, strict=True)
        ),
        chat=results.chat,
        roofline=results.roofline,
        loaded_memory_bytes=results.loaded_memory_bytes,
        peak_memory_bytes=results.peak_memory_bytes,
    )


def _settings(pipe: Pipeline, plan: Plan) -> dict[str, Any]:
    """How the model was loaded and measured, as JSON-ready values."""
    load_report, draft = pipe.load_report, pipe.load_report.draft
    return {
        "backend": load_report.backend,
        "ov_config": {key: str(value) for key, value in load_report.ov_config.items()},
        "context_length": pipe.context_length,
        "kv_cache": asdict(pipe.engine.kv_plan.layout),
        "prefill_chunk": pipe.engine.prefill_chunk,
        "compile_cache": load_report.cache,
        "draft_model": None if draft is None else draft.to_dict(),
        "adapters": [adapter.to_dict() for adapter in load_report.adapters],
        "prompt_tokens": list(plan.prompt_tokens),
        "new_tokens": plan.new_tokens,
        "repeat": plan.repeat,
        "discarded": _WARM_UP_REPLIES,
        "ends": plan.ends,
        "chat_turns": plan.chat_turns,
        "sampling": "greedy",
        "seed": plan.seed,
    }


def _load_ms(pipe: Pipeline) -> dict[str, float]:
    report = pipe.load_report
    return {"total": report.total_ms, "model": report.model_ms, "tokenizer": report.tokenizer_ms}


def _model_facts(pipe: Pipeline) -> dict[str, Any]:
    info = pipe.info
    return {
        "path": str(info.path),
        "family": info.family,
        "quantization": info.quantization,
        "weight_bytes": info.weight_bytes,
        "num_layers": info.num_layers,
        "hidden_size": info.hidden_size,
        "fingerprint": info.fingerprint,
        "exporter_versions": dict(info.exporter_versions),
        "manifest": info.manifest and dict(info.manifest),
    }
