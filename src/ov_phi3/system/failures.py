"""Translation of OpenVINO's exceptions into errors of this library.

OpenVINO, its plugins and OpenVINO GenAI raise `RuntimeError` for nearly everything. The text starts with the places in
their sources that the exception passed through. `essential_message` removes these, and the other functions choose an
error class and the advice by known parts of the text. The original exception becomes the `__cause__` where the caller
raises the error with `from`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ov_phi3.errors import ConfigError, DeviceError, Error, GenerationError, ModelError
from ov_phi3.system.core import shared_core
from ov_phi3.system.devices import DeviceInfo
from ov_phi3.system.gpu_stack import explain_missing_gpu

if TYPE_CHECKING:
    from pathlib import Path

    from ov_phi3.system.gpu_stack import Probe

__all__ = ["essential_message", "to_device_error", "to_generation_error", "to_load_error"]

# OpenVINO writes "Exception from FILE:LINE:" or "Check 'CONDITION' failed at FILE:LINE:", one line for each layer.
# XGrammar (structured output) writes "[HH:MM:SS] FILE:LINE: " in front of its message.
_SOURCE_LOCATION = re.compile(
    r"Exception from \S+:\d+:|Check '.*' failed at \S+:\d+:|^\[\d\d:\d\d:\d\d\] \S+:\d+: ", re.MULTILINE
)
_PROPERTY_REFUSED = (
    "unsupported property",
    "property key",
    "property description",
    "could not read number of streams",
    "unsupported configuration key",
    "attention backend must be",
    "bad as from",
    "isn't supported for argument",
    "could not convert to",
    "unable to cast",
    "null byte",
)
_CACHE_TYPES = re.compile(r"expect (?:kvcache|value_cache_type) type (\w+), current: (\w+)(?: , (\w+))?")
_NO_GPU = ("libopencl", "opencl.dll", "no supported devices found", "clgetplatformids")
_OUT_OF_MEMORY = (
    "exceed_allocatable_mem_size",
    "exceeded max size of memory",
    "cl_out_of_resources",
    "cl_out_of_host_memory",
    "cl_mem_object_allocation_failure",
    "out of gpu resources",
    "out_of_device_memory",
    "out_of_host_memory",
    "bad_alloc",
    "bad allocation",
    "not enough memory",
    "failed to allocate",
)
_LONGEST_READER_MESSAGE = 200


def essential_message(error: BaseException) -> str:
    """The message of an exception of OpenVINO in one line, without source locations; ends with a period.

    The name of the exception's class stands in for an empty message.
    """
    text = str(error)
    message = " ".join(_SOURCE_LOCATION.sub("", text).split()) or " ".join(text.split()) or type(error).__name__
    return message if message.endswith((".", "!", "?")) else f"{message}."


def to_generation_error(error: BaseException, structure: str | None = None) -> ConfigError | GenerationError:
    """The error for an exception that a backend raised during a request.

    Args:
        error: the exception.
        structure: the option that asked for structured output ("json_schema", "regex", "grammar"), if the request had
            one and the backend failed before the first token; then the option's value is the likely cause.
    """
    message = essential_message(error)
    if structure is not None and not _is_out_of_memory(error):
        return ConfigError(f"{structure} was not accepted: {message}")
    return GenerationError(f"the engine failed: {message} The pipeline can still be used.")


def to_load_error(error: BaseException, model: Path, device: DeviceInfo) -> Error:
    """The error for an exception that loading a model raised.

    Args:
        error: the exception.
        model: the model's `.xml` file. It is read again, because a damaged file is the likely cause if that fails too.
        device: the device that the model was compiled for.

    Returns:
        A `ConfigError` if a property was not accepted, a `ModelError` if the file cannot be read, else a `DeviceError`.
    """
    device_error = to_device_error(error, device)
    if isinstance(device_error, ConfigError):
        return device_error
    try:
        shared_core().read_model(model)
    except Exception as broken:  # noqa: BLE001 - the readers raise many types for a damaged file
        message = essential_message(broken)[-_LONGEST_READER_MESSAGE:]
        return ModelError(f"{model} is damaged, or not readable by this OpenVINO: {message} Export the model again.")
    return device_error


def to_device_error(
    error: BaseException, device: DeviceInfo | str, probe: Probe | None = None
) -> DeviceError | ConfigError:
    """The error, with advice, for an exception that OpenVINO raised while loading or running on a device.

    Args:
        error: the exception; its essential message is kept at the end of the new one.
        device: the device that was to run the model.
        probe: questions about the machine, for the reason if the GPU plugin did not load.

    Returns:
        A `ConfigError` if a property was not accepted, else a `DeviceError`. An exception of these two classes is
        returned unchanged.
    """
    if isinstance(error, (DeviceError, ConfigError)):
        return error
    message = essential_message(error)
    lower = str(error).lower()
    if isinstance(error, TypeError) or any(sign in lower for sign in _PROPERTY_REFUSED):
        return ConfigError(f"{device} does not accept a property in ov_config: {message}")
    if types := _CACHE_TYPES.search(str(error)):
        expected, *found = (name for name in types.groups() if name)
        return ConfigError(
            f"{device}: the precision of the KV cache ({' and '.join(dict.fromkeys(found))}) contradicts the one that "
            f"the device computes in, which needs {expected}, f16 or u8. Change or leave out KV_CACHE_PRECISION, "
            "KEY_CACHE_PRECISION and VALUE_CACHE_PRECISION in ov_config, or INFERENCE_PRECISION_HINT."
        )
    return DeviceError(f"{device}: {_advice(error, lower, device, probe)} OpenVINO's message: {message}")


def _advice(error: BaseException, lower: str, device: DeviceInfo | str, probe: Probe | None) -> str:
    if _is_out_of_memory(error):
        return _memory_advice(lower, device)
    if any(sign in lower for sign in _NO_GPU):
        return explain_missing_gpu(probe)
    if "compiled blob" in lower:
        return "The compile cache belongs to another OpenVINO or driver: delete the CACHE_DIR folder and load again."
    if "vcl" in lower or "ze_result" in lower or "level zero" in lower:
        return "The NPU driver is missing or too old for this model: update Intel's NPU driver, or use another device."
    if "is not registered" in lower or "cannot load library" in lower:
        return "OpenVINO's plugin for this device does not load: pip install --force-reinstall openvino."
    return "The device could not run the model. Run 'ov-phi3 doctor', and check whether device='CPU' runs it."


def _is_out_of_memory(error: BaseException) -> bool:
    lower = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in lower for sign in _OUT_OF_MEMORY)


def _memory_advice(lower: str, device: DeviceInfo | str) -> str:
    advice = (
        "Not enough memory. Loading takes about twice the size of the weights, plus the KV cache: use an int4 export, "
        "a smaller context_length or kv_cache_gb, or close other programs."
    )
    if not str(device).upper().startswith("GPU"):
        return advice
    if "exceed" in lower:
        advice += (
            " One buffer was larger than the driver's limit for a single allocation; "
            "ov_config={'GPU_ENABLE_LARGE_ALLOCATIONS': True} lifts that limit on drivers that support it."
        )
    if isinstance(device, DeviceInfo) and device.discrete is False:
        advice += " An integrated GPU shares the machine's memory; its share is set in the graphics driver's settings."
    return advice + " After CL_OUT_OF_RESOURCES a driver may hang: restart the process."
