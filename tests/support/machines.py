"""Devices and machines for tests: a CPU, two GPUs, an NPU, and a Linux machine with or without parts of a GPU stack."""

from __future__ import annotations

from pathlib import Path

from ov_phi3.system.devices import DeviceInfo
from ov_phi3.system.gpu_stack import Probe

CPU = DeviceInfo("CPU", "Intel(R) Core(TM) Ultra 7", "CPU", capabilities=("FP32", "INT8"))
IGPU = DeviceInfo("GPU.0", "Intel(R) Arc(TM) Graphics (iGPU)", "GPU", False, "24.35.30872", 28 << 30)
DGPU = DeviceInfo("GPU.1", "Intel(R) Arc(TM) A770 Graphics (dGPU)", "GPU", True, "24.35.30872", 16 << 30)
NPU = DeviceInfo("NPU", "Intel(R) AI Boost", "NPU", False, "1.8.0")
ALL_DEVICES = [CPU, IGPU, DGPU, NPU]


def gpu_probe(
    root: Path,
    *,
    loader: bool = True,
    icd: bool = True,
    node: bool = True,
    allowed: bool = True,
    vendor: str = "0x8086",
) -> Probe:
    """A Linux machine with an Intel GPU; any part of its GPU stack can be left out."""
    if icd:
        (root / "etc/OpenCL/vendors").mkdir(parents=True)
        (root / "etc/OpenCL/vendors/intel.icd").write_text("/usr/lib/x86_64-linux-gnu/intel-opencl/libigdrcl.so\n")
    if node:
        (root / "dev/dri").mkdir(parents=True)
        (root / "dev/dri/renderD128").write_text("")
        (root / "sys/class/drm/renderD128/device").mkdir(parents=True)
        (root / "sys/class/drm/renderD128/device/vendor").write_text(vendor + "\n")

    def load(name: str) -> None:
        if not loader:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    return Probe(root, "linux", load, lambda _: allowed)
