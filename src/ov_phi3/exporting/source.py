"""The source of an export: a directory with a Hugging Face model, or a name on the hub. Checked before any work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ov_phi3.errors import ExportError, ModelError
from ov_phi3.files import expanded
from ov_phi3.model.adapter import HUB_NAME, Adapter, read_adapter
from ov_phi3.model.config import Phi3Config, read_json
from ov_phi3.model.files import has_weights, listing
from ov_phi3.model.safetensors import read_header
from ov_phi3.system.memory import machine_memory

__all__ = [
    "Source",
    "check_full_precision",
    "check_space",
    "find_adapter",
    "find_source",
    "hub_revision",
    "local_source",
]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_GIB = 2**30
_BYTES_PER_VALUE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Source:
    """A source that was checked.

    Attributes:
        name: the argument for optimum-cli: an absolute path, or the name on the hub.
        local: whether the source is a directory.
        config: its `config.json`; None for a name on the hub, until the file is downloaded.
        weight_bytes: size of the weights in bytes; None for a name on the hub.
        parameters: number of weights; None for a name on the hub.
        revision: commit on the hub, or None.
    """

    name: str
    local: bool
    config: Phi3Config | None = None
    weight_bytes: int | None = None
    parameters: int | None = None
    revision: str | None = None


def find_source(source: str | os.PathLike[str]) -> Source:
    """Decide whether a source is a directory or a name on the hub, and check a directory.

    Raises:
        ModelError: it is neither, or the directory cannot be exported.
        TypeError: it is not a path or a string.
    """
    path = expanded(source)
    if path.exists():
        return local_source(path.resolve())
    if isinstance(source, str) and _is_hub_name(source):
        return Source(source, local=False)
    raise ModelError(
        f"{str(source)!r} is neither a directory nor a hub name; expected a directory with config.json, weights and "
        "tokenizer, or a name such as 'microsoft/Phi-3-mini-4k-instruct'."
    )


def find_adapter(adapter: str | os.PathLike[str]) -> Adapter | str:
    """The adapter in a folder, checked, or its name on the hub.

    Raises:
        ModelError: it is neither, or no LoRA adapter that peft saved.
        TypeError: it is not a path or a string.
    """
    path = expanded(adapter)
    if isinstance(adapter, str) and not path.exists() and _is_hub_name(adapter):
        return adapter
    if path.is_file():
        raise ModelError(f"{path} is a file; expected the folder of the adapter, {path.parent}.")
    return read_adapter(path)


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and ".." not in name


def local_source(path: Path) -> Source:
    """Check a directory with a Hugging Face model.

    Raises:
        ModelError: it is no directory, has no `config.json`, weights or tokenizer, has missing or cut off shards, or is
            of another architecture.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is a file; expected the directory that holds the model, {path.parent}.")
    names = listing(path)
    if "adapter_config.json" in names:
        raise ModelError(_adapter(path))
    if "config.json" not in names:
        raise ModelError(f"{path} has no config.json; expected a directory with a Hugging Face model.")
    config = Phi3Config.read(path / "config.json")
    check_full_precision(config)
    if not has_weights(names):
        if "openvino_model.xml" in names:
            raise ModelError(f"{path} is exported already; load it, or export from the original model.")
        raise ModelError(f"{path} has no weights; expected *.safetensors (or pytorch_model*.bin) beside config.json.")
    if not any(name in names for name in _TOKENIZERS):
        raise ModelError(f"{path} has no tokenizer; expected tokenizer.json or tokenizer.model beside config.json.")
    size, parameters = _check_weights(path, names)
    return Source(str(path), True, config, size, parameters)


def check_full_precision(config: Phi3Config) -> None:
    """Refuse a checkpoint whose weights are quantised already (bitsandbytes, GPTQ, AWQ, ...).

    Raises:
        ModelError: its config has a `quantization_config`.
    """
    quantization = config.file.data.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise ModelError(
        f"{config.file.path}: the weights are quantised already ({method or 'quantization_config'}), and an export "
        "needs them in full precision. Export the model that this one was made from, which its model card names; the "
        "recipe 'int4' quantises it."
    )


def _adapter(path: Path) -> str:
    """The message about a folder with a LoRA adapter, which names its base model."""
    base = read_json(path / "adapter_config.json").data.get("base_model_name_or_path")
    return (
        f"{path} holds a LoRA adapter, not a model. Export its base model{f' {base!r}' if base else ''} with "
        "adapter=PATH (--adapter PATH), which merges it."
    )


def _check_weights(path: Path, names: Mapping[str, int]) -> tuple[int, int]:
    """Size in bytes and number of the weights, after checking that no shard is missing or cut off."""
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    if "model.safetensors.index.json" in names:
        file = read_json(path / "model.safetensors.index.json")
        weights = file.data.get("weight_map")
        if not isinstance(weights, dict):
            raise file.error("weight_map", weights, "an object that maps each weight to its file")
        shards = sorted({str(name) for name in weights.values()})
        if missing := [name for name in shards if name not in names]:
            raise ModelError(f"{path} lacks {', '.join(missing)}, named by {file.path.name}; download them as well.")
    if not shards:
        size = sum(names[name] for name in names if has_weights({name: 0}))
        return size, size // 2
    parts = [_values(path / name) for name in shards]
    return sum(names[name] for name in shards), sum(parts)


def _values(file: Path) -> int:
    """Number of values in a safetensors file."""
    return sum(entry.size // _BYTES_PER_VALUE.get(entry.dtype, 1) for entry in read_header(file).values())


def check_space(source: Source, flags: Mapping[str, Any], directory: Path, *, merges: bool = False) -> str | None:
    """Check that there is enough disk and memory for an export.

    Disk: the model in the source's precision, which optimum-cli writes before it quantises, and the result; with an
    adapter, the merged model too. Memory: 1.5
    times the source's weights (measured: 11 GB for 7.6 GB of Phi-3-mini); swap counts.

    Returns:
        A warning if the free memory may be too small, or None.

    Raises:
        ExportError: the free disk space or the total memory is too small.
    """
    if source.weight_bytes is None or source.parameters is None:
        return None
    bits = {"fp32": 32, "fp16": 16, "int8": 8.5}.get(flags.get("weight_format", "int8"), 6.5)
    result = int(source.parameters * bits / 8)
    disk = result if flags.get("weight_format") in ("fp16", "fp32") else result + source.weight_bytes
    disk += source.weight_bytes if merges else 0
    free = shutil.disk_usage(directory).free
    if free < disk:
        raise ExportError(
            f"{directory} has {free / _GIB:.1f} GiB free; the export needs about {disk / _GIB:.1f} GiB while it runs "
            f"({result / _GIB:.1f} GiB for its result). Make room, or choose an output on another disk."
        )
    needed, memory = int(1.5 * source.weight_bytes), machine_memory()
    total = None if memory is None else memory.total_with_swap
    available = None if memory is None else memory.available_with_swap
    if total is not None and total < needed:
        raise ExportError(
            f"This machine has {total / _GIB:.1f} GiB of memory; the export needs about {needed / _GIB:.1f} GiB. "
            "Export on a larger machine and copy the result, or use an exported model."
        )
    if available is not None and available < needed:
        return (
            f"{available / _GIB:.1f} GiB of memory are free and the export needs about {needed / _GIB:.1f} GiB: it may "
            "be slow, or be killed. Close other programs."
        )
    return None


def hub_revision(snapshot: Path) -> str | None:
    """The commit in a path of the hub's cache, `.../snapshots/<commit>/config.json`; None for another path."""
    parent = snapshot.parent
    return parent.name if parent.parent.name == "snapshots" else None
