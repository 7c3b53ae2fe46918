"""`load`: from a model directory to a `Pipeline`, checking everything on the way that can be known before the first
token.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3 import config_names, versions
from ov_phi3 import device as devices
from ov_phi3.backends import BACKENDS, Backend, Request
from ov_phi3.compile_cache import cache_key, load_guarded, prepare
from ov_phi3.errors import ConfigError, Error, ModelError, TemplateError, did_you_mean
from ov_phi3.generation_config import GenerationConfig
from ov_phi3.model_info import ModelInfo
from ov_phi3.pipeline import Pipeline
from ov_phi3.template import ChatTemplate, Message
from ov_phi3.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ov_phi3.device import DeviceInfo

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
        ov_config: the properties that the engine was given.
        warnings: what works, but not as it should; also given as `ModelWarning`.
    """

    model_ms: float
    tokenizer_ms: float
    total_ms: float
    cache: str
    cache_dir: Path | None
    ov_config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def load(
    model_dir: str | os.PathLike[str],
    device: str = "AUTO",
    *,
    backend: str = "llm_pipeline",
    ov_config: Mapping[str, Any] | None = None,
    context_length: int | None = None,
    kv_cache_gb: float | None = None,
    template: ChatTemplate | None = None,
) -> Pipeline:
    """Load an exported model.

    Args:
        model_dir: what `export` wrote, or `optimum-cli export openvino`.
        device: "AUTO" (a discrete GPU, else any GPU, else the CPU) or exactly one device, such as "GPU.0".
        backend: "llm_pipeline", which is `openvino_genai.LLMPipeline`.
        ov_config: OpenVINO properties, laid over the latency defaults `PERFORMANCE_HINT=LATENCY`, `NUM_STREAMS=1` and
            `CACHE_DIR=""`. A `CACHE_DIR` is kept apart by model, versions, driver and device, and checked by a canary.
        context_length: tokens that prompt and reply share; default: the model's own.
        kv_cache_gb: most memory for the KV cache, in GiB; default: as it grows.
        template: the chat layout; default: the one that the model's own chat template describes.

    Raises:
        ModelError: the directory is missing, incomplete, broken, not exported, or of another architecture.
        DeviceError: the device is not there or cannot run the model, or the OpenVINO packages do not fit together.
        ConfigError: an unknown backend or property, or a value out of range.
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
    window = _context_length(context_length, info)
    chosen = _device(device)
    properties = devices.merge_config(chosen, ov_config)
    if kv_cache_gb is not None:
        window = min(window, _limit_cache(properties, kv_cache_gb, info, chosen))
    tokenizer, tokenizer_ms = _timed(
        lambda: Tokenizer(info.path, template or ChatTemplate.for_info(info), vocab_size=info.vocab_size)
    )
    (engine, cache, cache_dir), model_ms = _timed(lambda: _open(info, chosen, properties, tokenizer))
    if template is None:
        doubts += _template_doubts(engine, tokenizer.template, info.chat_template)
    if info.rope_boundary is not None and window > info.rope_boundary:
        doubts.append(
            f"this LongRoPE model rotates keys differently past {info.rope_boundary} tokens, and keys that were cached "
            "before a reply or chat crosses that length stay as they were: what follows is not exact. Pass "
            f"context_length={info.rope_boundary}, or keep prompt and reply on one side of it."
        )
    report = LoadReport(
        model_ms=model_ms,
        tokenizer_ms=tokenizer_ms,
        total_ms=(time.perf_counter() - begun) * 1000.0,
        cache=cache,
        cache_dir=cache_dir,
        ov_config=properties,
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
        context_length=window,
        defaults=defaults,
        load_report=report,
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


def _context_length(wanted: int | None, info: ModelInfo) -> int:
    if wanted is None:
        return info.context_length
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f"context_length must be a whole number of tokens, not {wanted!r}")
    if not 2 <= wanted <= info.context_length:
        raise ConfigError(f"context_length={wanted}; expected 2 to {info.context_length}, the model's own.")
    return wanted


def _device(name: str) -> DeviceInfo:
    present = devices.devices()
    chosen = devices.resolve(name, present)
    if advice := devices.hint(chosen, present):
        _log.warning("%s", advice)
    return chosen


def _limit_cache(properties: dict[str, Any], gib: float, info: ModelInfo, device: DeviceInfo) -> int:
    """Put a limit on the KV cache into the properties; returns the tokens that fit it.

    Counted at float16, which is what GPUs hold; a CPU holds 8 bits by default and stays below the limit.
    """
    if isinstance(gib, bool) or not isinstance(gib, (int, float)):
        raise TypeError(f"kv_cache_gb must be a number of GiB, not {gib!r}")
    if "scheduler_config" in properties:
        raise ConfigError("kv_cache_gb and ov_config['scheduler_config'] both limit the KV cache; give one of them.")
    block = 16 if device.kind == "GPU" else 32  # tokens per block of GenAI's paged attention
    if not gib <= 2**20:
        raise ConfigError(f"kv_cache_gb={gib}; expected a number of GiB that a machine can have.")
    blocks = int(gib * 2**30 / (info.kv_bytes_per_token * block)) if gib > 0 else 0
    if blocks < 2:
        least = 2 * block * info.kv_bytes_per_token / 2**30
        raise ConfigError(f"kv_cache_gb={gib} holds no conversation; this model needs at least {least:.4f} GiB.")
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.enable_prefix_caching = True
    # As in GenAI's own latency setting: a whole prompt in one step. The default of 256 is meant for many users at once.
    scheduler.max_num_batched_tokens = 2**31 - 1
    properties["scheduler_config"] = scheduler
    return (blocks - 1) * block


def _open(
    info: ModelInfo, device: DeviceInfo, properties: dict[str, Any], tokenizer: Tokenizer
) -> tuple[Backend, str, Path | None]:
    """The engine, and how a compile cache was used."""
    from ov_phi3.backends.llm_pipeline import LLMPipelineBackend

    def compile_with(cache_dir: str) -> Backend:
        return LLMPipelineBackend(info.path, device.name, {**properties, "CACHE_DIR": cache_dir})

    def canary(engine: Backend) -> list[int]:
        return _canary(engine, info, tokenizer)

    base = properties["CACHE_DIR"]
    try:
        if not base:
            return compile_with(""), "off", None
        folder = prepare(base, cache_key(info.fingerprint, versions.installed(), device, properties))
        engine, state = load_guarded(folder, lambda: compile_with(str(folder)), canary, lambda e: e.close())
    except Error:
        raise
    except Exception as exc:
        raise _explained(exc, info, device) from exc
    return engine, state, folder


def _explained(exc: Exception, info: ModelInfo, device: DeviceInfo) -> Error:
    """Whether an engine that did not load tells of the properties, the model's files or the device."""
    found = devices.explain_device_failure(exc, device)
    if not isinstance(found, ConfigError):
        import openvino

        path = info.path / "openvino_model.xml"
        try:
            openvino.Core().read_model(path)
        except Exception as broken:  # noqa: BLE001 - whatever the reader makes of a damaged file
            said = " ".join(str(broken).split())[-200:]
            return ModelError(f"{path} is damaged, or not of this OpenVINO: {said} Export the model again.")
    return found


def _canary(engine: Backend, info: ModelInfo, tokenizer: Tokenizer) -> list[int]:
    """Eight greedy ids to a fixed prompt."""
    ids = tokenizer.encode_messages([{"role": "user", "content": "Name three colours."}])
    config = GenerationConfig(max_new_tokens=8, do_sample=False, ignore_eos=True).resolve(room=8)
    seen: list[int] = []

    def emit(new: Any) -> bool:
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
