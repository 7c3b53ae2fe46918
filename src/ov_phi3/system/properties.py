"""OpenVINO properties for one device: the latency defaults, and the user's properties over them.

`openvino_genai.LLMPipeline` takes OpenVINO's compile properties and a few keys of its own in one dictionary. An unknown
key would fail inside a plugin with an unhelpful message; `merge_config` refuses it before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError, did_you_mean
from ov_phi3.system.core import shared_core

if TYPE_CHECKING:
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["latency_properties", "merge_config"]

# OpenVINO's core takes these itself, for every device, even if a plugin does not list them (tested on CPU, 2026.4.1).
_CORE_KEYS = frozenset({"CACHE_DIR", "CACHE_ENCRYPTION_CALLBACKS", "CACHE_MODE", "ENABLE_MMAP", "FORCE_TBB_TERMINATE"})
# LLMPipeline takes these before it passes the rest to the plugin; "extensions" are libraries for the core.
_GENAI_KEYS = frozenset({"ATTENTION_BACKEND", "draft_model", "extensions", "prompt_lookup", "scheduler_config"})
# LLMPipeline reads these on the NPU only; on another device it passes them to a plugin that does not know them.
_NPU_KEYS = frozenset(
    {
        "BLOB_PATH",
        "EXPORT_BLOB",
        "GENERATE_CONFIG",
        "GENERATE_HINT",
        "MAX_PROMPT_LEN",
        "MIN_RESPONSE_LEN",
        "PREFILL_CONFIG",
        "PREFILL_HINT",
        "SHARED_HEAD_CONFIG",
    }
)
# Keys that a plugin accepts but does not list in SUPPORTED_PROPERTIES; the plugin itself rejects unknown ones by name.
_PLUGIN_PREFIXES = {"CPU": (), "GPU": ("GPU_",), "NPU": ("NPU_", "NPUW_", "++")}
_PLUGIN_KEYS = {"CPU": frozenset({"CPU_RUNTIME_CACHE_CAPACITY"}), "GPU": frozenset[str](), "NPU": frozenset[str]()}
_SET_ELSEWHERE = {
    "DEVICE_ID": "choose the device with device=, for example device='GPU.1'",
    "DEVICE_PROPERTIES": "one device runs the model: give its properties directly",
    "MULTI_DEVICE_PRIORITIES": "one device runs the model: choose it with device=",
    "adapters": "give the adapter's folder to load(adapters=...)",
}


def latency_properties(device: DeviceInfo) -> dict[str, str]:
    """The properties for the shortest time to the first and to the next token on this device.

    A single request uses the whole device (`PERFORMANCE_HINT=LATENCY`, `NUM_STREAMS=1`), and by default no compile
    cache is written (`CACHE_DIR=""`). The NPU always runs one stream, so `NUM_STREAMS` is left out for it.
    """
    properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
    if device.kind == "NPU":
        del properties["NUM_STREAMS"]
    return properties


def merge_config(
    device: DeviceInfo,
    ov_config: Mapping[str, Any] | None = None,
    supported: Callable[[str], Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """The latency defaults of a device with the user's properties over them, after checking every key.

    Args:
        device: the device that the properties are for.
        ov_config: property name to value, as `openvino_genai.LLMPipeline` takes them.
        supported: returns SUPPORTED_PROPERTIES of a device by name, {property: "RO" | "RW" | "WO"}; by default from
            OpenVINO.

    Returns:
        A new dictionary for `LLMPipeline(..., **config)`; `CACHE_DIR` in it is always a string.

    Raises:
        ConfigError: a key is unknown on this device, read-only, or set by another argument.
        TypeError: `ov_config` is not a mapping, a key is not a string, or a value is None.
    """
    merged: dict[str, Any] = dict(latency_properties(device))
    if ov_config is None:
        return merged
    if not isinstance(ov_config, Mapping):
        raise TypeError(f"ov_config must be a mapping of property names to values, not {type(ov_config).__name__}")
    if ov_config:
        properties = (supported or _supported_properties)(device.name)
        for key, value in ov_config.items():
            _check(key, value, device, properties)
            merged[key] = value
    merged["CACHE_DIR"] = _cache_dir(merged["CACHE_DIR"])
    return merged


def _check(key: object, value: object, device: DeviceInfo, properties: Mapping[str, str]) -> None:
    if not isinstance(key, str):
        raise TypeError(f"ov_config keys must be strings, not {type(key).__name__}: {key!r}")
    if value is None:
        raise TypeError(f"ov_config[{key!r}] is None; leave the key out for the device's default")
    if key in _SET_ELSEWHERE:
        raise ConfigError(f"ov_config cannot hold {key!r}: {_SET_ELSEWHERE[key]}")
    if key in _NPU_KEYS and device.kind != "NPU":
        raise ConfigError(f"ov_config key {key!r} is for the NPU; {device.name} has no such property")
    known = {name for name, access in properties.items() if access != "RO"} | _CORE_KEYS | _GENAI_KEYS
    known |= _PLUGIN_KEYS[device.kind] | (_NPU_KEYS if device.kind == "NPU" else frozenset())
    if key in known or key.startswith(_PLUGIN_PREFIXES[device.kind]):
        return
    if key in properties:
        raise ConfigError(f"ov_config key {key!r} can only be read on {device.name}, not set")
    raise ConfigError(
        f"ov_config key {key!r} is unknown on {device.name} ({device.full_name}).{_suggestion(key, known)}"
        f" Accepted: {', '.join(sorted(known - _SET_ELSEWHERE.keys()))}"
    )


def _suggestion(key: str, known: Iterable[str]) -> str:
    names = list(known)
    same = [name for name in names if name.lower() == key.lower()]
    return f" Did you mean {same[0]!r}?" if same else did_you_mean(key, names) or did_you_mean(key.upper(), names)


def _cache_dir(value: object) -> str:
    if isinstance(value, (str, os.PathLike)):
        return os.fsdecode(value)
    raise TypeError(f"ov_config['CACHE_DIR'] must be a path, or '' for no cache, not {type(value).__name__}")


def _supported_properties(name: str) -> dict[str, str]:
    return {str(key): str(access) for key, access in shared_core().get_property(name, "SUPPORTED_PROPERTIES").items()}
