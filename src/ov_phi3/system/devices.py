"""Which devices OpenVINO sees here, which of them a name means, and what is missing when it is not there.

Names are OpenVINO's ("CPU", "GPU.0", "NPU") and reach it unchanged; "GPU" is its alias for GPU.0, and it lists a single
GPU as plain "GPU", so both are told as "GPU.0" here. GPU.0 is the integrated GPU wherever there is one
(https://docs.openvino.ai, "GPU Device", naming convention), hence `hint`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError, DeviceError, did_you_mean
from ov_phi3.system.core import shared_core
from ov_phi3.system.gpu_stack import explain_missing_gpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ov_phi3.system.gpu_stack import Probe

__all__ = ["SEE_DOCTOR", "DeviceInfo", "devices", "hint", "resolve"]

_KINDS = ("CPU", "GPU", "NPU")
_EXACT = re.compile(r"(CPU|GPU|NPU)(\.\w+)*")
SEE_DOCTOR = " Run 'ov-phi3 doctor' for the whole picture."
_VIRTUAL = ("HETERO", "MULTI", "BATCH")
_ACCEPTED = (
    "'AUTO', 'CPU', 'GPU.0' (or 'GPU', the same), 'GPU.1' and so on, 'NPU', or 'AUTO:' and a list like 'AUTO:GPU,CPU'"
)


@dataclass(frozen=True)
class DeviceInfo:
    """One device that OpenVINO can run a model on.

    Attributes:
        name: what to pass as `device=`: "CPU", "GPU.0", "GPU.1", "NPU".
        full_name: the product's name (FULL_DEVICE_NAME), for example "Intel(R) Arc(TM) A770 Graphics (dGPU)".
        kind: "CPU", "GPU" or "NPU".
        discrete: whether it is a card of its own (DEVICE_TYPE); None for a CPU and where the plugin does not tell.
        driver: version of the driver (GPU_DRIVER_VERSION, NPU_DRIVER_VERSION), None for a CPU or when unknown.
        memory_bytes: memory that the device may use, in bytes (GPU_DEVICE_TOTAL_MEM_SIZE, NPU_DEVICE_TOTAL_MEM_SIZE).
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


def devices(core: Any = None) -> list[DeviceInfo]:
    """The devices that OpenVINO sees on this machine, in its order.

    Args:
        core: an `openvino.Core` to ask; a new one by default. Imports openvino on first use.

    Raises:
        DeviceError: openvino cannot be imported, or cannot list devices.

    """
    if core is None:
        core = _new_core()
    return [_describe(core, str(name)) for name in core.available_devices]


def _new_core() -> Any:
    try:
        return shared_core()
    except ImportError as error:
        raise DeviceError(
            f"openvino cannot be imported ({error}); reinstall it: pip install --force-reinstall openvino"
        ) from error


def _describe(core: Any, name: str) -> DeviceInfo:
    kind = name.partition(".")[0]

    def ask(key: str) -> Any:
        try:
            return core.get_property(name, key)
        except Exception:  # noqa: BLE001 - a plugin that does not know a property raises whatever it likes
            return None

    def text(key: str) -> str | None:
        value = ask(key)
        return None if value is None else str(value).strip() or None

    memory = ask(f"{kind}_DEVICE_TOTAL_MEM_SIZE") if kind != "CPU" else None
    return DeviceInfo(
        name="GPU.0" if name == "GPU" else name,
        full_name=text("FULL_DEVICE_NAME") or name,
        kind=kind,
        discrete=_discrete(text("DEVICE_TYPE")) if kind != "CPU" else None,
        driver=text(f"{kind}_DRIVER_VERSION") if kind != "CPU" else None,
        memory_bytes=None if memory is None else int(memory),
        capabilities=tuple(str(item) for item in ask("OPTIMIZATION_CAPABILITIES") or ()),
        uuid=text("DEVICE_UUID") if kind != "CPU" else None,
        architecture=text("DEVICE_ARCHITECTURE"),
    )


def _discrete(device_type: str | None) -> bool | None:
    last = (device_type or "").rpartition(".")[2].upper()
    return {"DISCRETE": True, "INTEGRATED": False}.get(last)


def resolve(
    name: str = "AUTO", available: Sequence[DeviceInfo] | None = None, probe: Probe | None = None
) -> DeviceInfo:
    """The device that a name means on this machine. A named device is never replaced by another one.

    "AUTO" is a discrete GPU, else any GPU, else the CPU, and never the NPU. "AUTO:GPU,CPU" is the first entry of the
    list that is there, with "GPU" in the list meaning any GPU, discrete first. Upper and lower case are the same.

    Args:
        name: a device name.
        available: the devices to choose from; OpenVINO is asked by default.
        probe: where to look for the reason when a GPU is not there.

    Raises:
        DeviceError: the device is not there; names those that are, and for a GPU what is missing.
        ConfigError: not a device name, or a virtual device (HETERO, MULTI, BATCH).
        TypeError: not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"device must be a string such as 'GPU.0' or 'AUTO', not {type(name).__name__}: {name!r}")
    wanted = name.strip().upper()
    prefix, colon, entries = wanted.partition(":")
    if prefix in _VIRTUAL:
        raise ConfigError(
            f"device {name!r}: {prefix} is not supported, one device runs the model. Accepted: {_ACCEPTED}"
        )
    choices = [entry.strip() for entry in entries.split(",")] if prefix == "AUTO" and colon else [wanted]
    for choice in choices:
        if choice != "AUTO" and not _EXACT.fullmatch(choice):
            raise ConfigError(_unknown(name, choice))
    found = list(devices() if available is None else available)
    for choice in choices:
        match = _pick(choice, found, in_list=bool(colon))
        if match is not None:
            return match
    raise DeviceError(_absent(name, choices, found, probe))


def _pick(choice: str, found: Sequence[DeviceInfo], *, in_list: bool) -> DeviceInfo | None:
    gpus = sorted((info for info in found if info.kind == "GPU"), key=lambda info: info.discrete is not True)
    if choice == "AUTO":
        candidates = gpus + [info for info in found if info.kind == "CPU"]
    elif choice == "GPU" and in_list:
        candidates = gpus
    elif choice == "NPU":
        candidates = [info for info in found if info.kind == "NPU"]
    else:
        exact = "GPU.0" if choice == "GPU" else choice
        candidates = [info for info in found if info.name.upper() == exact]
    return candidates[0] if candidates else None


def _unknown(name: str, choice: str) -> str:
    if choice.startswith("-"):
        return f"device {name!r}: a device cannot be excluded with '-'; list the ones you want. Accepted: {_ACCEPTED}"
    near = did_you_mean(choice, ("AUTO", "CPU", "GPU", "GPU.0", "GPU.1", "NPU"))
    return f"device {name!r} is not a device name.{near} Accepted: {_ACCEPTED}"


def _absent(name: str, choices: Iterable[str], found: Sequence[DeviceInfo], probe: Probe | None) -> str:
    present = ", ".join(str(info) for info in found) or "none"
    message = f"device {name!r} is not there. OpenVINO sees: {present}."
    kinds = {choice.partition(".")[0] for choice in choices}
    if "GPU" in kinds and not any(info.kind == "GPU" for info in found):
        message += f" {explain_missing_gpu(probe)}"
    if "NPU" in kinds:
        message += " An NPU needs Intel's NPU driver and, on Linux, permission to open /dev/accel/accel0."
    return message + SEE_DOCTOR


def hint(device: DeviceInfo, available: Iterable[DeviceInfo]) -> str:
    """A sentence to log when an integrated GPU was chosen and a discrete one is there too, otherwise ''."""
    if device.kind != "GPU" or device.discrete is not False:
        return ""
    better = [info for info in available if info.kind == "GPU" and info.discrete]
    if not better:
        return ""
    return f"{device} is the integrated GPU; {better[0]} is discrete and usually faster: device={better[0].name!r}"
