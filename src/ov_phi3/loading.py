"""`load`: from a model directory to a `Pipeline`.

Four steps: check the arguments, plan what to load, open backend and tokenizer, report. All that can be checked before
the model is compiled is checked before.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ov_phi3.adapters import Adapters, check_adapters
from ov_phi3.backends.protocol import Backend, BackendName, BackendSpec, LoadRequest
from ov_phi3.backends.registry import backend_spec
from ov_phi3.draft_models import draft_request, read_draft_model
from ov_phi3.engine.engine import Engine
from ov_phi3.engine.limits import Limits
from ov_phi3.engine.longrope import LongRope
from ov_phi3.engine.parking import Parking
from ov_phi3.engine.residency import ResidentBackend
from ov_phi3.engine.runner import LARGE_MODEL_CHUNK, PREFILL_CHUNK, Runner
from ov_phi3.errors import ConfigError, Error
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.kv.layout import inference_precision
from ov_phi3.kv.sizing import plan_kv_cache
from ov_phi3.load_arguments import OWN_BACKEND, Unloading, check_arguments, check_concurrency
from ov_phi3.load_report import AdapterReport, DraftReport, LoadReport, ModelWarning
from ov_phi3.model.info import ModelInfo
from ov_phi3.model_defaults import model_defaults, supported_defaults
from ov_phi3.opening import OpenedBackend, open_backend
from ov_phi3.pipeline import Pipeline
from ov_phi3.system import devices, versions
from ov_phi3.system.core import few_kernels, give_memory_back
from ov_phi3.system.properties import merge_config
from ov_phi3.text.template import ChatTemplate
from ov_phi3.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["load"]

_DEFAULT_BACKEND = "llm_pipeline"
_LARGE_MODEL = 2**30  # bytes of weights
_DEFAULT_ASSISTED_TOKENS = 5  # candidates per step of prompt lookup and draft models; GenAI's own default
_ASSISTED_PROPERTIES = frozenset({"prompt_lookup", "draft_model"})
_GENAI_PROPERTIES = _ASSISTED_PROPERTIES | {"scheduler_config", "extensions", "ATTENTION_BACKEND"}  # of the model alone
_log = logging.getLogger("ov_phi3")
T = TypeVar("T")


def load(
    model_dir: str | os.PathLike[str],
    device: str = "AUTO",
    *,
    backend: BackendName | None = None,
    ov_config: Mapping[str, Any] | None = None,
    context_length: int | None = None,
    kv_cache_gb: float | None = None,
    prefill_chunk: int | None = None,
    concurrency: int = 1,
    template: ChatTemplate | None = None,
    adapters: Adapters | None = None,
    draft_model: str | os.PathLike[str] | None = None,
    draft_device: str | None = None,
    idle_unload: float | None = None,
    unload_dir: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """Load an exported model: what `export` wrote, or `optimum-cli export openvino`.

    Args:
        model_dir: its directory.
        device: "AUTO" (a discrete GPU, else any GPU, else the CPU) or exactly one device, such as "GPU.0".
        backend: "llm_pipeline", which is `openvino_genai.LLMPipeline`, the default; or "infer_request", our own engine
            on paged attention, the default with `concurrency`, `draft_model` or `unload_dir`: saved KV caches and more.
        ov_config: OpenVINO properties; they override the latency defaults `PERFORMANCE_HINT=LATENCY`, `NUM_STREAMS=1`
            and `CACHE_DIR=""`. A `CACHE_DIR` has a sub-folder per model, versions, driver, device and backend, and is
            checked by a canary. A model with float32 weights also computes and caches in float32 on the CPU.
        context_length: tokens that prompt and reply share; default: the model's own, or what the memory holds.
        kv_cache_gb: most memory for the KV cache, in GiB; default: one conversation of `context_length`.
        prefill_chunk: prompt tokens per chunk of the prefill; between two chunks progress is reported and a reply can
            be cancelled. Default: 2048, 256 on a CPU with a model of over 1 GiB, 0 (whole prompts) on "infer_request".
        concurrency: requests that run at once on "infer_request", and conversations that the KV cache has room for.
        template: the chat template; default: the model's own.
        adapters: LoRA adapters of peft: a folder, a list of them, or a mapping to strengths.
        draft_model: a smaller exported model with the same tokenizer that guesses tokens (docs/options.md#draft-model).
        draft_device: its device; default: the model's.
        idle_unload: seconds without a request after which it is unloaded, see `Pipeline.unload`; default: never.
        unload_dir: a directory that has the keys and values of open chats while it is unloaded; default: none has.

    Raises:
        ModelError: the directory or an adapter is missing, incomplete, broken, or of another architecture.
        DeviceError: the device is missing or cannot run the model, or the OpenVINO packages do not fit together.
        ConfigError: an unknown backend or property, a value out of range or not for this backend, or too little memory.
        TypeError: an argument of the wrong type.

    Warns:
        ModelWarning: `ModelInfo.warnings`, or the model's own chat template cannot be rendered.
    """
    began = time.perf_counter()
    spec = backend_spec(_default_backend(concurrency, draft_model, unload_dir) if backend is None else backend)
    versions.check()
    info = ModelInfo.from_dir(model_dir)
    check_arguments(info, context_length, prefill_chunk, template)
    check_concurrency(concurrency, spec)
    unloading = Unloading.of(idle_unload, unload_dir, spec)
    own = model_defaults(info)
    draft = read_draft_model(draft_model, info)
    plan = _plan(spec, info, device, ov_config, context_length, kv_cache_gb, prefill_chunk, concurrency, draft)
    request = replace(_with_draft(plan, draft, draft_device, ov_config), adapters=check_adapters(adapters, info))
    return _pipeline(spec, request, _open(spec, request, template), own, prefill_chunk, unloading, began)


def _pipeline(
    spec: BackendSpec,
    request: LoadRequest,
    opened: _Opened,
    own_options: tuple[GenerationConfig, list[str]],
    prefill_chunk: int | None,
    unloading: Unloading,
    began: float,
) -> Pipeline:
    """The pipeline of an opened model, after its warnings were issued."""
    info = request.info
    try:
        engine = _engine(spec, request, opened, own_options, prefill_chunk, unloading)
        report = _report(request, opened, [*info.warnings, *own_options[1]], began)
        for warning in report.warnings:
            warnings.warn(f"{info.path.name}: {warning}", ModelWarning, stacklevel=3)
        return Pipeline(engine=engine, tokenizer=opened.tokenizer, device=request.device, load_report=report)
    except BaseException:
        opened.model.backend.close()  # a warning that is an error, or Ctrl-C
        raise


def _default_backend(concurrency: object, draft_model: object, unload_dir: object) -> str:
    return _DEFAULT_BACKEND if concurrency == 1 and draft_model is None and unload_dir is None else OWN_BACKEND


# -- plan --------------------------------------------------------------------------------------------------------------


def _plan(
    spec: BackendSpec,
    info: ModelInfo,
    device_name: str,
    ov_config: Mapping[str, Any] | None,
    context_length: int | None,
    kv_cache_gb: float | None,
    prefill_chunk: int | None,
    concurrency: int,
    draft: ModelInfo | None,
) -> LoadRequest:
    """Device, properties and the size of the KV cache."""
    device = _resolve_device(device_name)
    properties = spec.resolve_properties(device, _properties(info, device, ov_config))
    if draft is not None and not spec.capabilities.plans_drafts:
        properties["draft_model"] = str(draft.path)
    kv = plan_kv_cache(
        info,
        device,
        properties,
        context_length=context_length,
        kv_cache_gb=kv_cache_gb,
        conversations=concurrency,
        draft=draft,
    )
    fixed = kv_cache_gb is not None
    return LoadRequest(info, device, properties, kv, concurrency, prefill_chunk or 0, paging_required=fixed)


def _with_draft(
    request: LoadRequest, draft: ModelInfo | None, device_name: str | None, ov_config: Mapping[str, Any] | None
) -> LoadRequest:
    """The request with its draft model, which has the same properties."""
    if draft is None:
        if device_name is not None:
            raise ConfigError(f"draft_device={device_name!r} is for a draft model: give draft_model too.")
        return request
    device = request.device if device_name is None else _resolve_device(device_name)
    properties = _properties(draft, device, ov_config) | {"CACHE_DIR": ""}
    properties = {key: value for key, value in properties.items() if key not in _GENAI_PROPERTIES}
    return replace(request, draft=draft_request(draft, device, properties, request.kv, request.concurrency))


def _resolve_device(name: str) -> DeviceInfo:
    present = devices.devices()
    device = devices.resolve(name, present)
    if advice := devices.hint(device, present):
        _log.warning("%s", advice)
    return device


def _properties(info: ModelInfo, device: DeviceInfo, ov_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's properties over the defaults for a device and a model."""
    merged = merge_config(device, ov_config)  # first: it checks them
    return {**_float32_properties(info, device, ov_config or {}), **merged}


def _float32_properties(info: ModelInfo, device: DeviceInfo, ov_config: Mapping[str, Any]) -> dict[str, Any]:
    """Float32 throughout for a model with float32 weights on the CPU, which would use bfloat16 where it can.

    A float32 export is made for the model's exact numbers. A precision that the user names has precedence. A GPU that
    computes in float32 needs a KV cache in float32: with another one, its paged attention does not work (2026.4.1).
    """
    if device.kind == "GPU" and inference_precision(device.kind, ov_config) == "f32":
        return {"KV_CACHE_PRECISION": "f32"}
    if device.kind != "CPU" or info.quantization != "f32" or "INFERENCE_PRECISION_HINT" in ov_config:
        return {}
    return {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


# -- open --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """Backend and tokenizer, and the milliseconds that each took."""

    model: OpenedBackend
    model_ms: float
    tokenizer: Tokenizer
    tokenizer_ms: float


def _open(spec: BackendSpec, request: LoadRequest, template: ChatTemplate | None) -> _Opened:
    """Open backend and tokenizer at the same time: the tokenizer needs a tenth of the time, mostly on another core."""
    info = request.info
    tokenizer: Future[Tokenizer] = Future()
    with few_kernels(), ThreadPoolExecutor(max_workers=1) as beside:
        chosen = template or ChatTemplate.for_info(info)
        opening = beside.submit(
            _timed, lambda: _into(tokenizer, lambda: Tokenizer(info.path, chosen, vocab_size=info.vocab_size))
        )
        try:
            model, model_ms = _timed(lambda: open_backend(spec, request, tokenizer))
        except Error:
            opening.result()  # a broken tokenizer breaks the backend too; then its error is the better one
            raise
        try:
            opened, tokenizer_ms = opening.result()
        except BaseException:
            model.backend.close()
            raise
    return _Opened(model, model_ms, opened, tokenizer_ms)


def _into(future: Future[T], work: Callable[[], T]) -> T:
    """Run some work and put its outcome into a future."""
    try:
        result = work()
    except BaseException as exc:
        future.set_exception(exc)
        raise
    future.set_result(result)
    return result


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return work(), (time.perf_counter() - began) * 1000.0


# -- report ------------------------------------------------------------------------------------------------------------


def _report(request: LoadRequest, opened: _Opened, notes: list[str], began: float) -> LoadReport:
    """What loading took and found."""
    backend = opened.model.backend
    notes = [*notes, *request.kv.warnings, *opened.model.warnings, *backend.warnings]
    if (problem := opened.tokenizer.template.problem) is not None:
        advice = "Messages are refused: pass load(template=...), or give prompts as Raw text or token ids."
        notes.append(f"{problem} {advice}")
    give_memory_back()
    total_ms = (time.perf_counter() - began) * 1000.0
    _log.info("loaded %s on %s in %.0f ms", request.info.path, request.device, total_ms)
    return LoadReport(
        model_ms=opened.model_ms,
        tokenizer_ms=opened.tokenizer_ms,
        total_ms=total_ms,
        cache=opened.model.cache,
        cache_dir=opened.model.cache_dir,
        ov_config=opened.model.properties,
        backend=backend.capabilities.name,
        kv_cache_tokens=request.kv.capacity or None,
        warnings=tuple(notes),
        draft=_draft_report(request.draft, backend),
        adapters=tuple(AdapterReport(adapter.path, factor, adapter.sha256) for adapter, factor in request.adapters),
    )


def _draft_report(draft: LoadRequest | None, backend: Backend) -> DraftReport | None:
    if draft is None:
        return None
    return DraftReport(draft.info.path, draft.device.name, draft.info.weight_bytes, backend.draft_ms)


def _engine(
    spec: BackendSpec,
    request: LoadRequest,
    opened: _Opened,
    own_options: tuple[GenerationConfig, list[str]],
    prefill_chunk: int | None,
    unloading: Unloading,
) -> Engine:
    info, window, backend = request.info, request.kv.context_length, opened.model.backend
    assisted = bool(_ASSISTED_PROPERTIES & request.properties.keys())
    long_rope = LongRope(
        boundary=info.rope_boundary if (info.rope_boundary or 0) < window else None,
        assisted_tokens=_DEFAULT_ASSISTED_TOKENS if assisted else 0,
    )
    defaults = supported_defaults(own_options[0], backend, own_options[1])
    if request.draft is not None and spec.capabilities.plans_drafts:
        defaults = defaults.replace(speculation="auto")
    resident = ResidentBackend(backend, lambda: _reopen(spec, request, opened.tokenizer))
    runner = Runner(resident, long_rope, _chunk(backend, request, prefill_chunk))
    # A backend that schedules carries every option across the boundary.
    crossing = LongRope() if backend.capabilities.schedules else long_rope
    limits = Limits(defaults, window, request.kv.reason, info.vocab_size, crossing, backend.prefix_index)
    return Engine(
        info,
        opened.tokenizer,
        runner,
        limits,
        request.kv,
        concurrency=request.concurrency,
        idle_unload=unloading.after_s,
        parking=Parking(unloading.directory),
    )


def _reopen(spec: BackendSpec, request: LoadRequest, tokenizer: Tokenizer) -> Backend:
    """The backend after it was unloaded, with the tokenizer, which stayed in memory."""
    for adapter, _ in request.adapters:
        adapter.check_unchanged()
    future: Future[Tokenizer] = Future()
    future.set_result(tokenizer)
    with few_kernels():
        backend = open_backend(spec, request, future).backend
    give_memory_back()
    return backend


def _chunk(backend: Backend, request: LoadRequest, prefill_chunk: int | None) -> int:
    """Prompt tokens per chunk of the prefill; 0 for whole prompts."""
    if backend.needs_whole_prompts:
        return 0
    if prefill_chunk is not None:
        return prefill_chunk
    if backend.capabilities.cancels_within_pass:
        return 0  # OpenVINO computes many tokens more slowly behind others that are cached
    large = request.device.kind == "CPU" and request.info.weight_bytes > _LARGE_MODEL
    return LARGE_MODEL_CHUNK if large else PREFILL_CHUNK
