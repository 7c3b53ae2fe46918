"""Opening a backend: compiled, or from the compile cache; with its fallback, and its failures translated."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.protocol import Backend, BackendSpec, LoadRequest, Request
from ov_phi3.errors import Error
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.system import versions
from ov_phi3.system.compile_cache import cache_key, load_guarded, prepare
from ov_phi3.system.core import FEW_KERNELS
from ov_phi3.system.failures import essential_message, to_load_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.generation.results import TokenLogprob
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = ["OpenedBackend", "open_backend"]

_CANARY_PROMPT = "Name three colours."
_CANARY_TOKENS = 8
_CACHED_STATEFUL_MODELS = 2


@dataclass(frozen=True)
class OpenedBackend:
    """A backend, and how it was opened.

    Attributes:
        backend: the backend.
        cache: how the compile cache was used, see `LoadReport.cache`.
        cache_dir: the sub-folder of the compile cache, or None.
        properties: the properties it was opened with, without a scheduler that the backend made.
        warnings: sentences for the user.
    """

    backend: Backend
    cache: str
    cache_dir: Path | None
    properties: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def open_backend(spec: BackendSpec, request: LoadRequest, tokenizer: Future[Tokenizer]) -> OpenedBackend:
    """Open a backend, or its fallback.

    Args:
        spec: the backend.
        request: what to load.
        tokenizer: the tokenizer, which is opened at the same time; needed for the compile cache's canary only.

    Raises:
        ConfigError, DeviceError, ModelError: it does not load; the class says why.
    """
    request = replace(request, tokenizer=tokenizer)
    try:
        return _open(spec, request, tokenizer)
    except Error:
        raise
    except Exception as exc:
        if (alternative := spec.fallback(request, essential_message(exc))) is not None:
            other, warning = alternative
            with contextlib.suppress(Exception):
                return replace(_open(spec, other, tokenizer), warnings=(warning,))
        raise to_load_error(exc, request.info.path / "openvino_model.xml", request.device) from exc


def _open(spec: BackendSpec, request: LoadRequest, tokenizer: Future[Tokenizer]) -> OpenedBackend:
    draft = None if request.draft is None else _with_cache(request.draft, "")

    def open_with(cache_dir: str) -> Backend:
        return spec.open(replace(_with_cache(request, cache_dir), draft=draft))

    base = request.properties["CACHE_DIR"]
    if base and not spec.capabilities.caches_compiled:
        warning = (
            f"CACHE_DIR has no effect with backend={spec.capabilities.name!r}: OpenVINO (2026.4.1) never finds its "
            "edited graph in the compile cache again, and would write a new blob at every load."
        )
        properties = {**request.properties, "CACHE_DIR": ""}
        return OpenedBackend(open_with(""), "off", None, properties, (warning,))
    if not base:
        return OpenedBackend(open_with(""), "off", None, request.properties)
    # A scheduler does not affect the compiled model, and its text differs from run to run.
    compiled = {key: value for key, value in request.properties.items() if key != "scheduler_config"}
    compiled["backend"] = spec.capabilities.name
    if request.adapters:
        compiled["adapters"] = [(adapter.sha256, factor) for adapter, factor in request.adapters]
    folder = prepare(base, cache_key(request.info.fingerprint, versions.installed(), request.device, compiled))
    canary = _Canary(tokenizer.result(), request)
    backend, state = load_guarded(folder, lambda: open_with(str(folder)), canary.run, lambda opened: opened.close())
    canary.commit(backend)
    return OpenedBackend(backend, state, folder, request.properties)


def _with_cache(request: LoadRequest, cache_dir: str) -> LoadRequest:
    """The request with a compile cache, and with few kernels on a CPU."""
    few_kernels = {"CPU_RUNTIME_CACHE_CAPACITY": _kernel_cache(request)} if request.device.kind == "CPU" else {}
    return replace(request, properties={**few_kernels, **request.properties, "CACHE_DIR": cache_dir})


_stateful_models = itertools.count()


def _kernel_cache(request: LoadRequest) -> str:
    """How many kernels the CPU plugin keeps, see `system.core.few_kernels`.

    The kernel cache of a graph with a state keeps the attention's kernel, and with it the KV cache, after the model is
    freed (2 to 7 MiB on the demo model and a thread, 37 MiB in `LLMPipeline`; openvino 2026.4.1). Without the kernel
    cache nothing stays, but the first two passes of a request take 20 to 50 ms longer. So the first models of a process
    have it, and a process that loads again and again does not.
    """
    stateful = str(request.properties.get("ATTENTION_BACKEND", "")).upper() == "SDPA"
    return "0" if stateful and next(_stateful_models) >= _CACHED_STATEFUL_MODELS else FEW_KERNELS


class _Canary:
    """A few greedy ids for a fixed prompt, which reveal a compile cache that gives wrong answers."""

    def __init__(self, tokenizer: Tokenizer, request: LoadRequest) -> None:
        self._prompt: NDArray[np.int64] = tokenizer.encode_messages([{"role": "user", "content": _CANARY_PROMPT}])
        self._end_ids = request.info.eos_token_ids
        self._ids: list[int] = []

    def run(self, backend: Backend) -> list[int]:
        """The ids that this backend generates."""
        ids: list[int] = []

        def sink(new: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:  # noqa: ARG001
            ids.extend(new)
            return True

        config = GenerationConfig(max_new_tokens=_CANARY_TOKENS, do_sample=False, ignore_eos=True)
        backend.generate(Request(self._prompt, config.resolve(room=_CANARY_TOKENS), self._end_ids), sink)
        self._ids = ids
        return ids[:_CANARY_TOKENS]

    def commit(self, backend: Backend) -> None:
        """Record in the prefix index that the backend's cache holds the canary."""
        if self._ids and backend.prefix_index is not None:
            backend.prefix_index.commit(self._prompt, self._ids[:-1], longest=len(self._ids), exact=True)
