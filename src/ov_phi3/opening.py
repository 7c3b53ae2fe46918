"""Opening an engine: which backend, compiled or from the compile cache, and the books of its KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ov_phi3.backends.infer_request import InferRequestBackend
from ov_phi3.backends.llm_pipeline import LLMPipelineBackend
from ov_phi3.backends.protocol import Backend, Request
from ov_phi3.engine.runner import LARGE_MODEL_CHUNK, PREFILL_CHUNK
from ov_phi3.errors import Error
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.kv.cache import BlockLedger, Books
from ov_phi3.kv.sizing import KVPool
from ov_phi3.system import versions
from ov_phi3.system.compile_cache import cache_key, load_guarded, prepare
from ov_phi3.system.core import FEW_KERNELS
from ov_phi3.system.failures import essential_message, to_load_error

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.generation.results import TokenLogprob
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.system.devices import DeviceInfo
    from ov_phi3.text.tokenizer import Tokenizer

    Opening: TypeAlias = Future[tuple[Tokenizer, float]]

__all__ = ["ASSISTED", "Opened", "chunk_for", "open_engine"]

E = TypeVar("E", bound=Backend)
Engine: TypeAlias = LLMPipelineBackend | InferRequestBackend


ASSISTED = 5
"""Candidates per step of prompt lookup and draft models, where a request does not say; GenAI's own default."""


@dataclass(frozen=True)
class Opened:
    """An engine, and how it was opened."""

    engine: Engine
    cache: str
    cache_dir: Path | None
    ledger: Books | None
    given: dict[str, Any]
    doubts: tuple[str, ...] = ()


def open_engine(
    backend: str,
    info: ModelInfo,
    device: DeviceInfo,
    properties: dict[str, Any],
    pool: KVPool,
    opening: Opening,
    *,
    must_page: bool,
    batch_step: int | None = None,
) -> Opened:
    """An engine of the backend's kind.

    The tokenizer is being opened meanwhile. With `must_page` paged attention is not to be done without, as the cache's
    size or several requests at once were asked for. With a `batch_step` several run at once, and so many tokens at most
    are computed in a step (0: any number).

    Raises:
        ConfigError, DeviceError, ModelError: it does not load; which of them tells why.
    """
    if backend == "infer_request":
        return _open_own_loop(info, device, properties, pool, opening)
    return _open_llm_pipeline(info, device, properties, pool, opening, must_page, batch_step)


def _open_llm_pipeline(
    info: ModelInfo,
    device: DeviceInfo,
    given: dict[str, Any],
    pool: KVPool,
    opening: Opening,
    must_page: bool,
    batch_step: int | None,
) -> Opened:
    """The engine: on paged attention, or without it where it cannot have that."""
    try:
        return _open_with(info, device, given, pool.properties(given, batch_step or 0), pool, opening, batch_step)
    except Error:
        raise
    except Exception as exc:
        if pool.scheduler and not must_page and "ATTENTION_BACKEND" not in given:
            given = {**given, "ATTENTION_BACKEND": "SDPA"}
            with contextlib.suppress(Exception):
                opened = _open_with(info, device, given, given, pool, opening)
                doubt = (
                    f"{device.name} did not take paged attention ({essential_message(exc)}): there is no prefix cache, "
                    "and every turn of a chat is computed whole."
                )
                return replace(opened, doubts=(doubt,))
        raise to_load_error(exc, info.path / "openvino_model.xml", device) from exc


def _open_with(
    info: ModelInfo,
    device: DeviceInfo,
    given: dict[str, Any],
    properties: dict[str, Any],
    pool: KVPool,
    opening: Opening,
    batch_step: int | None = None,
) -> Opened:
    def compile_with(cache_dir: str) -> LLMPipelineBackend:
        return LLMPipelineBackend(
            info.path,
            device.name,
            {**_few_kernels(device), **properties, "CACHE_DIR": cache_dir},
            block_size=pool.layout.block_size,
            rope_boundary=info.rope_boundary,
            batches=batch_step is not None,
        )

    engine, state, folder, probe, seen = _compiled(compile_with, info, device, properties, opening)
    rules = engine.prefix_cache
    ledger = None if rules is None else BlockLedger(rules.block_size, rules.num_blocks)
    if ledger is not None and probe is not None and seen:
        ledger.record(probe, seen[:-1], longest=len(seen), exact=True)
    return Opened(engine, state, folder, ledger, given)


def _open_own_loop(
    info: ModelInfo, device: DeviceInfo, properties: dict[str, Any], pool: KVPool, opening: Opening
) -> Opened:
    """The engine with our own decode loop."""

    def compile_with(cache_dir: str) -> InferRequestBackend:
        return InferRequestBackend(
            info.path,
            device.name,
            {**_few_kernels(device), **properties, "CACHE_DIR": cache_dir},
            capacity=max(pool.window, pool.num_blocks * pool.layout.block_size),
            rope_boundary=info.rope_boundary,
        )

    try:
        engine, state, folder, _, _ = _compiled(compile_with, info, device, properties, opening)
    except Error:
        raise
    except Exception as exc:
        raise to_load_error(exc, info.path / "openvino_model.xml", device) from exc
    return Opened(engine, state, folder, engine.slots, properties)


def _few_kernels(device: DeviceInfo) -> dict[str, str]:
    """How many kernels the CPU plugin keeps, see `system.core.few_kernels`."""
    return {"CPU_RUNTIME_CACHE_CAPACITY": FEW_KERNELS} if device.kind == "CPU" else {}


def _compiled(
    compile_with: Callable[[str], E], info: ModelInfo, device: DeviceInfo, properties: dict[str, Any], opening: Opening
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


def _canary(engine: Backend, ids: Any, info: ModelInfo) -> list[int]:
    """Eight greedy ids to a fixed prompt."""
    config = GenerationConfig(max_new_tokens=8, do_sample=False, ignore_eos=True).resolve(room=8)
    seen: list[int] = []

    def emit(new: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:  # noqa: ARG001
        seen.extend(new)
        return True

    engine.generate(Request(ids, config, info.eos_token_ids), emit)
    return seen[:8]


def chunk_for(engine: Engine, info: ModelInfo, device: DeviceInfo, wanted: int | None) -> int:
    """Prompt tokens per piece; 0 for whole prompts."""
    if isinstance(engine, InferRequestBackend):
        # It can stop within a pass, and OpenVINO computes many tokens slower behind others that are cached.
        return 0 if wanted is None or engine.whole_prompts else wanted
    if wanted is not None:
        return wanted
    return LARGE_MODEL_CHUNK if device.kind == "CPU" and info.weight_bytes > 2**30 else PREFILL_CHUNK
