"""The LoRA adapters of a `load`: which, how strong, and whether they fit the model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ov_phi3.errors import ConfigError
from ov_phi3.model.adapter import ADAPTER_CONFIG, Adapter, read_adapter
from ov_phi3.model.config import Phi3Config

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo

__all__ = ["Adapters", "check_adapters"]

_Path: TypeAlias = str | os.PathLike[str]
Adapters: TypeAlias = _Path | Sequence[_Path] | Mapping[str, float] | Mapping[os.PathLike[str], float]
"""A folder with an adapter, several, or a mapping of folders to strengths."""


def check_adapters(adapters: Adapters | None, info: ModelInfo) -> tuple[tuple[Adapter, float], ...]:
    """Each adapter with the factor of its B A: the strength times the adapter's own scale.

    Args:
        adapters: as given to `load`.
        info: the model.

    Raises:
        ConfigError: a strength is not finite or missing.
        ModelError: an adapter is missing or damaged, or does not fit the model.
        TypeError: an argument of the wrong type.
    """
    if adapters is None:
        return ()
    model = Phi3Config.read(info.path / "config.json")
    source = (info.manifest or {}).get("source")
    result = []
    for path, strength in _strengths(adapters).items():
        adapter = read_adapter(path)
        adapter.check_fit(model, source if isinstance(source, str) else None)
        adapter.check_loadable()
        result.append((adapter, _factor(adapter, strength)))
    return tuple(result)


def _strengths(adapters: Adapters) -> dict[_Path, float | None]:
    """Strength by path; None where none is given."""
    if isinstance(adapters, Mapping):
        for path, strength in adapters.items():
            if isinstance(strength, bool) or not isinstance(strength, (int, float)):
                raise TypeError(f"adapters[{str(path)!r}] is {strength!r}; expected a strength such as 1.0")
            if not math.isfinite(strength):
                raise ConfigError(f"adapters[{str(path)!r}] is {strength!r}; expected a finite strength such as 1.0.")
        return {path: float(strength) for path, strength in adapters.items()}
    if isinstance(adapters, (str, os.PathLike)):
        return {adapters: None}
    if not isinstance(adapters, Sequence) or any(not isinstance(path, (str, os.PathLike)) for path in adapters):
        raise TypeError(f"adapters is {adapters!r}; expected a folder, a list of folders, or a mapping to strengths")
    paths = dict.fromkeys(adapters, None)
    if len(paths) < len(adapters):
        raise ConfigError("adapters names a folder twice; give a mapping with its strength instead: {folder: 2.0}.")
    return dict(paths)


def _factor(adapter: Adapter, strength: float | None) -> float:
    if adapter.scale is not None:
        return adapter.scale * (1.0 if strength is None else strength)
    if strength is None:
        raise ConfigError(
            f"{adapter.path} has no {ADAPTER_CONFIG} beside it, which gives its scale. Put it there, or give the scale "
            "(lora_alpha / r): adapters={path: scale}."
        )
    return strength
