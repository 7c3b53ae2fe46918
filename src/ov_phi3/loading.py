"""`load`: from a model directory to a `Pipeline`, checking everything on the way that can be known before the first
token.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.infer_request import infer_request_properties
from ov_phi3.backends.protocol import BACKENDS, Backend
from ov_phi3.engine.runner import LARGE_MODEL_CHUNK, Generator
from ov_phi3.errors import ConfigError, Error, ModelError, TemplateError, did_you_mean
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.hf import from_hf
from ov_phi3.kv.sizing import KVPool, plan
from ov_phi3.model.info import ModelInfo
from ov_phi3.opening import ASSISTED, chunk_for, open_engine
from ov_phi3.pipeline import Pipeline
from ov_phi3.system import devices, versions
from ov_phi3.system.core import few_kernels, give_memory_back
from ov_phi3.system.properties import merge_config
from ov_phi3.text.template import ChatTemplate, Message
from ov_phi3.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["LoadReport", "ModelWarning", "load"]

_log = logging.getLogger("ov_phi3")


class ModelWarning(UserWarning):
    """Something about a model that works, but not as it should."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took and found.

    Attributes:
        model_ms: reading and compiling the model, milliseconds.
        tokenizer_ms: opening the tokenizer, milliseconds.
        total_ms: all of `load`, milliseconds.
        cache: "off", or how the compile cache was used: "fresh" (written), "verified" or "purged".
        cache_dir: the sub-folder used, or None.
        ov_config: the properties that the engine was given; a scheduler of our own making is left out.
        backend: the name of the engine's backend.
        kv_cache_tokens: tokens that the KV cache has places for; None for one that grows.
        warnings: what works, but not as it should; also given as `ModelWarning`.
    """

    model_ms: float
    tokenizer_ms: float
    total_ms: float
    cache: str
    cache_dir: Path | None
    ov_config: Mapping[str, Any]
    backend: str
    kv_cache_tokens: int | None = None
    warnings: tuple[str, ...] = ()


def load(
    model_dir: str | os.PathLike[str],
    device: str = "AUTO",
    *,
    backend: str = "llm_pipeline",
    ov_config: Mapping[str, Any] | None = None,
    context_length: int | None = None,
    kv_cache_gb: float | None = None,
    prefill_chunk: int | None = None,
    concurrency: int = 1,
    template: ChatTemplate | None = None,
) -> Pipeline:
    """Load an exported model.

    Args:
        model_dir: what `export` wrote, or `optimum-cli export openvino`.
        device: "AUTO" (a discrete GPU, else any GPU, else the CPU) or exactly one device, such as "GPU.0".
        backend: "llm_pipeline", which is `openvino_genai.LLMPipeline`; or "infer_request", a decode loop of our own,
            whose KV caches can be saved and loaded, and which has `score`, logits processors and log-probabilities, but
            no beam search, structured output or speculative decoding. It caches in float16 unless told otherwise.
        ov_config: OpenVINO properties, laid over the latency defaults `PERFORMANCE_HINT=LATENCY`, `NUM_STREAMS=1` and
            `CACHE_DIR=""`. A `CACHE_DIR` is kept apart by model, versions, driver and device, and checked by a canary.
            A model with float32 weights also computes and caches in float32 on the CPU.
        context_length: tokens that prompt and reply share; default: the model's own, or what the memory holds.
        kv_cache_gb: most memory for the KV cache, in GiB; default: enough for one conversation of `context_length` on
            the CPU, as it grows on a GPU.
        prefill_chunk: prompt tokens computed at once; between two such pieces progress is told and a reply can be
            cancelled. Default 2048, and 256 on a CPU with a model of over 1 GiB; 0 computes whole prompts, which is the
            default of "infer_request": it can be cancelled within a prompt.
        concurrency: requests that run at once, by continuous batching ("llm_pipeline"; no prompt lookup, draft model or
            LongRoPE window). The KV cache is made for as many conversations; `prefill_chunk` is then 256 by default.
        template: the chat layout; default: the one that the model's own chat template describes.

    Raises:
        ModelError: the directory is missing, incomplete, broken, not exported, or of another architecture.
        DeviceError: the device is not there or cannot run the model, or the OpenVINO packages do not fit together.
        ConfigError: an unknown backend or property, a value out of range, or a window that the memory cannot hold.
        TypeError: an argument of the wrong type.

    Warns:
        ModelWarning: the model's own chat template gives something else than the layout that was chosen for it, or what
            `ModelInfo.warnings` says.
    """
    begun = time.perf_counter()
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend={backend!r}; expected one of {list(BACKENDS)}.{did_you_mean(str(backend), BACKENDS)}"
        )
    if template is not None and not isinstance(template, ChatTemplate):
        raise TypeError(f"template must be a ChatTemplate such as ChatTemplate.phi3(), not {template!r}")
    versions.check()
    info = ModelInfo.from_dir(model_dir)
    defaults, doubts = _model_defaults(info)
    _check_window(context_length, info)
    _check_chunk(prefill_chunk)
    chosen = _device(device)
    properties = {**_exact(info, chosen, ov_config or {}), **merge_config(chosen, ov_config)}
    if backend == "infer_request":
        properties = infer_request_properties(chosen, properties)
    pool = plan(
        info,
        chosen,
        properties,
        context_length=context_length,
        kv_cache_gb=kv_cache_gb,
        conversations=_check_concurrency(concurrency),
    )
    batch_step = None
    if concurrency > 1:
        _check_batching(concurrency, backend, info, pool, properties)
        batch_step = LARGE_MODEL_CHUNK if prefill_chunk is None else prefill_chunk
    # The tokenizer is opened beside the model, which takes ten times as long and leaves a core free for most of it.
    with few_kernels(), ThreadPoolExecutor(max_workers=1) as beside:
        layout = template or ChatTemplate.for_info(info)
        opening = beside.submit(_timed, lambda: Tokenizer(info.path, layout, vocab_size=info.vocab_size))
        try:
            opened, model_ms = _timed(
                lambda: open_engine(
                    backend,
                    info,
                    chosen,
                    properties,
                    pool,
                    opening,
                    must_page=kv_cache_gb is not None or concurrency > 1,
                    batch_step=batch_step,
                )
            )
        except Error:
            opening.result()  # a broken tokenizer keeps the engine from loading, too: then that is what to tell
            raise
        tokenizer, tokenizer_ms = opening.result()
    engine = opened.engine
    doubts += [*pool.doubts, *opened.doubts, *engine.doubts]
    if template is None:
        doubts += _template_doubts(engine, tokenizer.template, info.chat_template)
    give_memory_back()
    report = LoadReport(
        model_ms=model_ms,
        tokenizer_ms=tokenizer_ms,
        total_ms=(time.perf_counter() - begun) * 1000.0,
        cache=opened.cache,
        cache_dir=opened.cache_dir,
        ov_config=opened.given,
        backend=backend,
        kv_cache_tokens=pool.num_blocks * pool.layout.block_size or None,
        warnings=(*info.warnings, *doubts),
    )
    for doubt in report.warnings:
        warnings.warn(f"{info.path.name}: {doubt}", ModelWarning, stacklevel=2)
    _log.info("loaded %s on %s in %.0f ms", info.path, chosen, report.total_ms)
    return Pipeline(
        info=info,
        tokenizer=tokenizer,
        device=chosen,
        backend=engine,
        context_length=pool.window,
        defaults=defaults,
        load_report=report,
        generator=Generator(
            ledger=opened.ledger,
            rope_boundary=info.rope_boundary if (info.rope_boundary or 0) < pool.window else None,
            chunk=chunk_for(engine, info, chosen, prefill_chunk),
            assisted_tokens=ASSISTED if {"prompt_lookup", "draft_model"} & properties.keys() else 0,
        ),
        pool=pool,
        concurrency=concurrency,
    )


def _timed(work: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    return work(), (time.perf_counter() - begun) * 1000.0


def _model_defaults(info: ModelInfo) -> tuple[GenerationConfig, list[str]]:
    """The model's own generation options, and what in them cannot be honoured."""
    dropped: list[str] = []
    try:
        return GenerationConfig(**from_hf(info.generation_defaults, dropped=dropped)), dropped
    except (ConfigError, TypeError) as exc:
        raise ModelError(f"{info.path / 'generation_config.json'}: {exc} Correct the file or export again.") from exc


def _check_whole(name: str, value: object, of: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of {of}, not {value!r}")


def _check_window(wanted: int | None, info: ModelInfo) -> None:
    if wanted is None:
        return
    _check_whole("context_length", wanted, "tokens")
    if not 2 <= wanted <= info.context_length:
        raise ConfigError(f"context_length={wanted}; expected 2 to {info.context_length}, the model's own.")


def _check_chunk(wanted: int | None) -> None:
    if wanted is None:
        return
    _check_whole("prefill_chunk", wanted, "tokens")
    if wanted < 0:
        raise ConfigError(f"prefill_chunk={wanted}; expected a number of tokens, or 0 for whole prompts.")


def _check_concurrency(wanted: int) -> int:
    _check_whole("concurrency", wanted, "requests")
    if not 1 <= wanted <= 256:
        raise ConfigError(f"concurrency={wanted}; expected 1 to 256 requests at once.")
    return wanted


def _check_batching(
    concurrency: int, backend: str, info: ModelInfo, pool: KVPool, properties: Mapping[str, Any]
) -> None:
    """Refuse what cannot run with others beside it."""
    why = None
    if backend != "llm_pipeline":
        why = "backend='llm_pipeline'"
    elif not pool.scheduler:
        why = "paged attention, which is not to be had here, and no scheduler_config; kv_cache_gb= sizes the cache"
    elif assisted := {"prompt_lookup", "draft_model"} & properties.keys():
        why = f"a pipeline without {min(assisted)}"
    elif (info.rope_boundary or pool.window) < pool.window:
        # The graph chooses its factors once for all that is computed in a step.
        why = f"context_length={info.rope_boundary} or less: past that this LongRoPE model has other rotary factors"
    if why is not None:
        raise ConfigError(f"concurrency={concurrency} needs {why}.")


def _exact(info: ModelInfo, device: DeviceInfo, given: Mapping[str, Any]) -> dict[str, Any]:
    """Float32 throughout for a model with float32 weights on the CPU, which would take bfloat16 where it can.

    Who exports float32 wants the model's own numbers. A precision that the user names is left alone.
    """
    if device.kind != "CPU" or info.quantization != "f32" or "INFERENCE_PRECISION_HINT" in given:
        return {}
    return {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def _device(name: str) -> DeviceInfo:
    present = devices.devices()
    chosen = devices.resolve(name, present)
    if advice := devices.hint(chosen, present):
        _log.warning("%s", advice)
    return chosen


_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "First question."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "First question."}],
    [
        {"role": "user", "content": "First question."},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Second question."},
    ],
)


def _template_doubts(engine: Backend, template: ChatTemplate, source: str | None) -> list[str]:
    """Where the layout gives another prompt than the model's own chat template, which the engine can run."""
    if source is None:
        return []
    for messages in _PROBES:
        try:
            ours = template.render(messages)
        except TemplateError:
            continue  # a turn that the layout refuses is refused aloud when it is used
        theirs = engine.render(source, messages)
        if theirs is not None and theirs != ours:
            return [
                f"the {template.name} layout differs from the model's own chat template: the layout gives {ours!r}, "
                f"the model's template {theirs!r}. Pass load(template=...) with the right one."
            ]
    return []
