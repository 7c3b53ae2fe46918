"""What `load` reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["AdapterReport", "DraftReport", "LoadReport", "ModelWarning"]


class ModelWarning(UserWarning):
    """Something about a model works, but not as it should."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """A LoRA adapter that was applied.

    Attributes:
        path: its folder or file.
        factor: what its B A is multiplied with: the strength times the adapter's own scale.
        sha256: hash of its weights and its config.
    """

    path: Path
    factor: float
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, slots=True)
class DraftReport:
    """A draft model that was loaded beside a model.

    Attributes:
        path: its directory.
        device: the name of its device.
        weight_bytes: bytes of its weights.
        load_ms: reading and compiling it, in milliseconds, which `LoadReport.model_ms` contains; None with
            "llm_pipeline", which loads both together.
    """

    path: Path
    device: str
    weight_bytes: int
    load_ms: float | None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took and found.

    Attributes:
        model_ms: reading and compiling the model, and its draft model, in milliseconds.
        tokenizer_ms: opening the tokenizer, in milliseconds.
        total_ms: all of `load`, in milliseconds.
        cache: "off", or how the compile cache was used: "fresh" (written), "verified" or "purged".
        cache_dir: the sub-folder of the compile cache, or None.
        ov_config: the properties that the backend received, without a scheduler that `load` made.
        backend: the backend's name.
        kv_cache_tokens: tokens that the KV cache has room for; None for a cache that grows.
        warnings: sentences about what works, but not as it should; also issued as `ModelWarning`.
        draft: its draft model, or None.
        adapters: its LoRA adapters.
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
    draft: DraftReport | None = None
    adapters: tuple[AdapterReport, ...] = ()
