"""`load`: from a model directory to a `Pipeline`, checking everything on the way that can be known before the first
token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ov_phi3 import config_names, versions
from ov_phi3 import device as devices
from ov_phi3._core import shared_core
from ov_phi3.backends import BACKENDS, Backend, Request
from ov_phi3.backends.infer_request import InferRequestBackend, infer_request_properties
from ov_phi3.backends.llm_pipeline import LLMPipelineBackend
from ov_phi3.compile_cache import cache_key, load_guarded, prepare
from ov_phi3.errors import ConfigError, Error, ModelError, TemplateError, did_you_mean
from ov_phi3.generation_config import GenerationConfig
from ov_phi3.generator import LARGE_MODEL_CHUNK, PREFILL_CHUNK, Generator
from ov_phi3.kv_cache import BlockLedger, Books
from ov_phi3.kv_pool import KVPool, plan
from ov_phi3.model_info import ModelInfo
from ov_phi3.pipeline import Pipeline
from ov_phi3.template import ChatTemplate, Message
from ov_phi3.tokenizer import Tokenizer
from ov_phi3.worker import first_sentence

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.device import DeviceInfo
    from ov_phi3.results import TokenLogprob

    _Opening: TypeAlias = Future[tuple[Tokenizer, float]]

__all__ = ["LoadReport", "ModelWarning", "load"]

E = TypeVar("E", bound=Backend)
_Engine: TypeAlias = LLMPipelineBackend | InferRequestBackend

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
            cancelled. Default 2048, and 256 on a CPU with a model of over 1 GiB; 0 computes whole prompts.
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
    properties = {**_exact(info, chosen, ov_config or {}), **devices.merge_config(chosen, ov_config)}
    own_loop = backend == "infer_request"
    if own_loop:
        properties = infer_request_properties(chosen, properties)
    pool = plan(info, chosen, properties, context_length=context_length, kv_cache_gb=kv_cache_gb)
    # The tokenizer is opened beside the model, which takes ten times as long and leaves a core free for most of it.
    with ThreadPoolExecutor(max_workers=1) as beside:
        layout = template or ChatTemplate.for_info(info)
        opening = beside.submit(_timed, lambda: Tokenizer(info.path, layout, vocab_size=info.vocab_size))
        try:
            opened, model_ms = _timed(
                lambda: (
                    _open_own_loop(info, chosen, properties, pool, opening)
                    if own_loop
                    else _open(info, chosen, properties, pool, opening, kv_cache_gb is not None)
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
            chunk=_chunk(engine, info, chosen, prefill_chunk),
            assisted_tokens=_ASSISTED if {"prompt_lookup", "draft_model"} & properties.keys() else 0,
        ),
        pool=pool,
    )


def _timed(work: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    return work(), (time.perf_counter() - begun) * 1000.0


def _model_defaults(info: ModelInfo) -> tuple[GenerationConfig, list[str]]:
    """The model's own generation options, and what in them cannot be honoured."""
    dropped: list[str] = []
    try:
        return GenerationConfig(**config_names.from_hf(info.generation_defaults, dropped=dropped)), dropped
    except (ConfigError, TypeError) as exc:
        raise ModelError(f"{info.path / 'generation_config.json'}: {exc} Correct the file or export again.") from exc


def _check_window(wanted: int | None, info: ModelInfo) -> None:
    if wanted is None:
        return
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f"context_length must be a whole number of tokens, not {wanted!r}")
    if not 2 <= wanted <= info.context_length:
        raise ConfigError(f"context_length={wanted}; expected 2 to {info.context_length}, the model's own.")


def _check_chunk(wanted: int | None) -> None:
    if wanted is None:
        return
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f"prefill_chunk must be a whole number of tokens, not {wanted!r}")
    if wanted < 0:
        raise ConfigError(f"prefill_chunk={wanted}; expected a number of tokens, or 0 for whole prompts.")


def _chunk(engine: _Engine, info: ModelInfo, device: DeviceInfo, wanted: int | None) -> int:
    """Prompt tokens per piece; 0 for whole prompts."""
    if isinstance(engine, InferRequestBackend) and engine.whole_prompts:
        return 0
    if wanted is not None:
        return wanted
    return LARGE_MODEL_CHUNK if device.kind == "CPU" and info.weight_bytes > 2**30 else PREFILL_CHUNK


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


_ASSISTED = 5
"""Candidates per step of prompt lookup and draft models, where a request does not say; GenAI's own default."""


@dataclass(frozen=True)
class _Opened:
    """An engine, and how it was opened."""

    engine: _Engine
    cache: str
    cache_dir: Path | None
    ledger: Books | None
    given: dict[str, Any]
    doubts: tuple[str, ...] = ()


def _open(
    info: ModelInfo, device: DeviceInfo, given: dict[str, Any], pool: KVPool, opening: _Opening, must_page: bool
) -> _Opened:
    """The engine: on paged attention, or without it where it cannot have that."""
    try:
        return _open_with(info, device, given, pool.properties(given), pool, opening)
    except Error:
        raise
    except Exception as exc:
        if pool.scheduler and not must_page and "ATTENTION_BACKEND" not in given:
            given = {**given, "ATTENTION_BACKEND": "SDPA"}
            with contextlib.suppress(Exception):
                opened = _open_with(info, device, given, given, pool, opening)
                doubt = (
                    f"{device.name} did not take paged attention ({first_sentence(exc)}): there is no prefix cache, "
                    "and every turn of a chat is computed whole."
                )
                return replace(opened, doubts=(doubt,))
        raise _explained(exc, info, device) from exc


def _open_with(
    info: ModelInfo,
    device: DeviceInfo,
    given: dict[str, Any],
    properties: dict[str, Any],
    pool: KVPool,
    opening: _Opening,
) -> _Opened:
    def compile_with(cache_dir: str) -> LLMPipelineBackend:
        return LLMPipelineBackend(
            info.path,
            device.name,
            {**properties, "CACHE_DIR": cache_dir},
            block_size=pool.layout.block_size,
            rope_boundary=info.rope_boundary,
        )

    engine, state, folder, probe, seen = _compiled(compile_with, info, device, properties, opening)
    rules = engine.prefix_cache
    ledger = None if rules is None else BlockLedger(rules.block_size, rules.num_blocks)
    if ledger is not None and probe is not None and seen:
        ledger.record(probe, seen[:-1], longest=len(seen), exact=True)
    return _Opened(engine, state, folder, ledger, given)


def _open_own_loop(
    info: ModelInfo, device: DeviceInfo, properties: dict[str, Any], pool: KVPool, opening: _Opening
) -> _Opened:
    """The engine with our own decode loop."""

    def compile_with(cache_dir: str) -> InferRequestBackend:
        return InferRequestBackend(
            info.path,
            device.name,
            {**properties, "CACHE_DIR": cache_dir},
            capacity=max(pool.window, pool.num_blocks * pool.layout.block_size),
            rope_boundary=info.rope_boundary,
        )

    try:
        engine, state, folder, _, _ = _compiled(compile_with, info, device, properties, opening)
    except Error:
        raise
    except Exception as exc:
        raise _explained(exc, info, device) from exc
    return _Opened(engine, state, folder, engine.slots, properties)


def _compiled(
    compile_with: Callable[[str], E], info: ModelInfo, device: DeviceInfo, properties: dict[str, Any], opening: _Opening
) -> tuple[E, str, Path | None, NDArray[np.int64] | None, list[int]]:
    """An engine, compiled or from the compile cache; how the cache was used, its folder, and what was asked of it."""
    seen: list[int] = []
    base = properties["CACHE_DIR"]
    if not base:
        return compile_with(""), "off", None, None, seen
    tokenizer, _ = opening.result()
    probe = tokenizer.encode_messages([{"role": "user", "content": "Name three colours."}])
    # A scheduler has no bearing on what is compiled, and its text is not the same twice.
    compiled = {k: v for k, v in properties.items() if k != "scheduler_config"}
    folder = prepare(base, cache_key(info.fingerprint, versions.installed(), device, compiled))

    def canary(loaded: E) -> list[int]:
        seen[:] = _canary(loaded, probe, info)
        return seen

    engine, state = load_guarded(folder, lambda: compile_with(str(folder)), canary, lambda e: e.close())
    return engine, state, folder, probe, seen


def _explained(exc: Exception, info: ModelInfo, device: DeviceInfo) -> Error:
    """Whether an engine that did not load tells of the properties, the model's files or the device."""
    found = devices.explain_device_failure(exc, device)
    if not isinstance(found, ConfigError):
        path = info.path / "openvino_model.xml"
        try:
            shared_core().read_model(path)
        except Exception as broken:  # noqa: BLE001 - whatever the reader makes of a damaged file
            said = " ".join(str(broken).split())[-200:]
            return ModelError(f"{path} is damaged, or not of this OpenVINO: {said} Export the model again.")
    return found


def _canary(engine: Backend, ids: Any, info: ModelInfo) -> list[int]:
    """Eight greedy ids to a fixed prompt."""
    config = GenerationConfig(max_new_tokens=8, do_sample=False, ignore_eos=True).resolve(room=8)
    seen: list[int] = []

    def emit(new: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:  # noqa: ARG001
        seen.extend(new)
        return True

    engine.generate(Request(ids, config, info.eos_token_ids), emit)
    return seen[:8]


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
