"""The devices that OpenVINO lists, and the choice of one of them by name.

Names are OpenVINO's ("CPU", "GPU.0", "NPU") and are passed to it unchanged. OpenVINO lists a single GPU as "GPU", and
takes "GPU" as an alias for "GPU.0"; this library reports both as "GPU.0". If the machine has an integrated GPU, that is
GPU.0 (https://docs.openvino.ai, "GPU Device", naming convention), hence `hint`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError, DeviceError, did_you_mean
from ov_phi3.system import opencl
from ov_phi3.system.core import shared_core
from ov_phi3.system.gpu_stack import explain_missing_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ov_phi3.system.gpu_stack import Probe

__all__ = ["SEE_DOCTOR", "DeviceInfo", "devices", "hint", "resolve"]

SEE_DOCTOR = " Run 'ov-phi3 doctor' for all checks."
"""The end of a message about a missing device; the doctor leaves it out."""

_EXACT = re.compile(r"(CPU|GPU|NPU)(\.\w+)*")
_VIRTUAL = ("HETERO", "MULTI", "BATCH")
_ACCEPTED = (
    "'AUTO', 'CPU', 'GPU.0' (or 'GPU', the same), 'GPU.1' and so on, 'NPU', or 'AUTO:' and a list like 'AUTO:GPU,CPU'"
)


@dataclass(frozen=True)
class DeviceInfo:
    """A device that OpenVINO can run a model on. Each attribute names the OpenVINO property that it comes from.

    Attributes:
        name: the value for `device=`: "CPU", "GPU.0", "GPU.1", "NPU".
        full_name: the product's name (FULL_DEVICE_NAME), for example "Intel(R) Arc(TM) A770 Graphics (dGPU)".
        kind: "CPU", "GPU" or "NPU".
        discrete: whether it is a discrete GPU (DEVICE_TYPE); None for a CPU and if unknown.
        driver: version of the driver (from OpenCL for a GPU, NPU_DRIVER_VERSION); None for a CPU and if unknown.
        memory_bytes: memory that the device may use, in bytes (GPU_DEVICE_TOTAL_MEM_SIZE, NPU_DEVICE_TOTAL_MEM_SIZE);
            None for a CPU and if unknown.
        capabilities: OPTIMIZATION_CAPABILITIES, for example ("FP32", "FP16", "INT8").
        uuid: DEVICE_UUID, the same for one card under every name, or None.
        architecture: DEVICE_ARCHITECTURE, for example "intel64" or "GPU: vendor=0x8086 arch=v12.55.8", or None.
    """

    name: str
    full_name: str
    kind: str
    discrete: bool | None = None
    driver: str | None = None
    memory_bytes: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: str | None = None
    architecture: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.full_name})"


def devices(
    core: Any = None, gpu_driver: Callable[[str | None], str | None] = opencl.driver_version
) -> list[DeviceInfo]:
    """The devices that OpenVINO lists on this machine, in its order.

    Args:
        core: the `openvino.Core` to use; by default this library's own, which imports openvino on first use.
        gpu_driver: returns the driver version of a GPU by its DEVICE_UUID.

    Raises:
        DeviceError: openvino cannot be imported.
    """
    if core is None:
        core = _shared_core()
    return [_describe(core, str(name), gpu_driver) for name in core.available_devices]


def _shared_core() -> Any:
    try:
        return shared_core()
    except ImportError as error:
        raise DeviceError(
            f"openvino cannot be imported ({error}); reinstall it: pip install --force-reinstall openvino"
        ) from error


def _describe(core: Any, name: str, gpu_driver: Callable[[str | None], str | None]) -> DeviceInfo:
    kind = name.partition(".")[0]

    def read(key: str) -> Any:
        try:
            return core.get_property(name, key)
        except Exception:  # noqa: BLE001 - plugins raise many types for an unknown property
            return None

    def text(key: str) -> str | None:
        value = read(key)
        return None if value is None else str(value).strip() or None

    uuid = text("DEVICE_UUID") if kind != "CPU" else None
    driver = {"GPU": lambda: gpu_driver(uuid), "NPU": lambda: text("NPU_DRIVER_VERSION")}.get(kind, lambda: None)()
    memory = read(f"{kind}_DEVICE_TOTAL_MEM_SIZE") if kind != "CPU" else None
    return DeviceInfo(
        name="GPU.0" if name == "GPU" else name,
        full_name=text("FULL_DEVICE_NAME") or name,
        kind=kind,
        discrete=_discrete(text("DEVICE_TYPE")) if kind != "CPU" else None,
        driver=driver,
        memory_bytes=None if memory is None else int(memory),
        capabilities=tuple(str(item) for item in read("OPTIMIZATION_CAPABILITIES") or ()),
        uuid=uuid,
        architecture=text("DEVICE_ARCHITECTURE"),
    )


def _discrete(device_type: str | None) -> bool | None:
    last = (device_type or "").rpartition(".")[2].upper()
    return {"DISCRETE": True, "INTEGRATED": False}.get(last)


def resolve(
    name: str = "AUTO", available: Sequence[DeviceInfo] | None = None, probe: Probe | None = None
) -> DeviceInfo:
    """The device with a name. A missing device is never replaced by another one.

    "AUTO" is a discrete GPU, else any GPU, else the CPU; never the NPU. "AUTO:GPU,CPU" is the first entry of the list
    that exists; "GPU" in the list is any GPU, discrete ones first. Case is ignored.

    Args:
        name: a device name.
        available: the devices to choose from; by default all that OpenVINO lists.
        probe: questions about the machine, for the reason if there is no GPU.

    Raises:
        DeviceError: the device does not exist. The message lists the existing devices and, for a GPU, the missing
            parts.
        ConfigError: the name is no device name, or names a virtual device (HETERO, MULTI, BATCH).
        TypeError: the name is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"device must be a string such as 'GPU.0' or 'AUTO', not {type(name).__name__}: {name!r}")
    upper = name.strip().upper()
    prefix, colon, entries = upper.partition(":")
    if prefix in _VIRTUAL:
        raise ConfigError(
            f"device {name!r}: {prefix} is not supported, one device runs the model. Accepted: {_ACCEPTED}"
        )
    choices = [entry.strip() for entry in entries.split(",")] if prefix == "AUTO" and colon else [upper]
    for choice in choices:
        if choice != "AUTO" and not _EXACT.fullmatch(choice):
            raise ConfigError(_unknown_name(name, choice))
    present = list(devices() if available is None else available)
    for choice in choices:
        device = _choose(choice, present, in_list=bool(colon))
        if device is not None:
            return device
    raise DeviceError(_missing_device(name, choices, present, probe))


def _choose(choice: str, present: Sequence[DeviceInfo], *, in_list: bool) -> DeviceInfo | None:
    gpus = sorted((info for info in present if info.kind == "GPU"), key=lambda info: info.discrete is not True)
    if choice == "AUTO":
        candidates = gpus + [info for info in present if info.kind == "CPU"]
    elif choice == "GPU" and in_list:
        candidates = gpus
    elif choice == "NPU":
        candidates = [info for info in present if info.kind == "NPU"]
    else:
        exact = "GPU.0" if choice == "GPU" else choice
        candidates = [info for info in present if info.name.upper() == exact]
    return candidates[0] if candidates else None


def _unknown_name(name: str, choice: str) -> str:
    if choice.startswith("-"):
        return f"device {name!r}: a device cannot be excluded with '-'; list the devices to use. Accepted: {_ACCEPTED}"
    suggestion = did_you_mean(choice, ("AUTO", "CPU", "GPU", "GPU.0", "GPU.1", "NPU"))
    return f"device {name!r} is not a device name.{suggestion} Accepted: {_ACCEPTED}"


def _missing_device(name: str, choices: Iterable[str], present: Sequence[DeviceInfo], probe: Probe | None) -> str:
    names = ", ".join(str(info) for info in present) or "none"
    message = f"device {name!r} does not exist here. OpenVINO lists: {names}."
    kinds = {choice.partition(".")[0] for choice in choices}
    if "GPU" in kinds and not any(info.kind == "GPU" for info in present):
        message += f" {explain_missing_gpu(probe)}"
    if "NPU" in kinds:
        message += " An NPU needs Intel's NPU driver and, on Linux, permission to open /dev/accel/accel0."
    return message + SEE_DOCTOR


def hint(device: DeviceInfo, available: Iterable[DeviceInfo]) -> str:
    """A sentence to log if an integrated GPU was chosen although a discrete one exists; otherwise ''."""
    if device.kind != "GPU" or device.discrete is not False:
        return ""
    discrete = [info for info in available if info.kind == "GPU" and info.discrete]
    if not discrete:
        return ""
    return f"{device} is the integrated GPU; {discrete[0]} is discrete and usually faster: device={discrete[0].name!r}"
