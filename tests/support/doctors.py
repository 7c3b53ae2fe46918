"""Fake machines and sources of information for tests of the doctor."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ov_phi3.doctor import Check, Sources
from ov_phi3.system.devices import DeviceInfo
from ov_phi3.system.gpu_stack import Probe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CPU = DeviceInfo("CPU", "Intel(R) Core(TM) Ultra 7", "CPU")
IGPU = DeviceInfo("GPU.0", "Intel(R) Arc(TM) Graphics (iGPU)", "GPU", False, "24.35", 28 << 30)
DGPU = DeviceInfo("GPU.1", "Intel(R) Arc(TM) A770 Graphics (dGPU)", "GPU", True, "24.35", 16 << 30)
INFO = SimpleNamespace(
    family="phi-3",
    quantization="int4_sym",
    context_length=4096,
    exporter_versions={"optimum_intel": "2.2.0"},
    warnings=[],
)
VERSIONS: Mapping[str, str | None] = {"openvino": "2026.4.1", "openvino-genai": "2026.4.1.0"}


def machine(root: Path, *, gpu: bool = True, memory_gib: int = 32) -> Probe:
    """A Linux machine with or without an Intel GPU; every part of a GPU's stack is in place."""
    (root / "proc").mkdir()
    kib = memory_gib * 1024 * 1024
    (root / "proc/meminfo").write_text(f"MemTotal: {kib} kB\nMemAvailable: {kib} kB\n")
    if gpu:
        (root / "etc/OpenCL/vendors").mkdir(parents=True)
        (root / "etc/OpenCL/vendors/intel.icd").write_text("libigdrcl.so\n")
        (root / "dev/dri").mkdir(parents=True)
        (root / "dev/dri/renderD128").write_text("")
    return Probe(root, "linux", lambda _: None, lambda _: True)


def no_loader(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def sources(probe: Probe, seen: Sequence[DeviceInfo] = (CPU,), **changes: Any) -> Sources:
    def canary(_: Path, device: str, times: int) -> list[list[int]]:
        return [[1, 2, 3, 4, 5, 6, 7, 8]] * times

    base = Sources(probe, lambda: list(seen), lambda: VERSIONS, lambda _: INFO, canary, {}, probe.root / "home")
    return dataclasses.replace(base, **changes)


def named(checks: list[Check], name: str) -> Check:
    matches = [check for check in checks if check.name == name]
    assert len(matches) == 1, f"{name}: {checks}"
    return matches[0]


def model(tmp_path: Path, size: int = 1000) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    with (folder / "openvino_model.bin").open("wb") as file:
        file.truncate(size)  # sparse: takes no disk
    return folder


def raising(error: Exception) -> Any:
    def call(*_: object) -> Any:
        raise error

    return call


def root_of(root: Path) -> Path:
    other = root.parent / "other"
    other.mkdir()
    return other
