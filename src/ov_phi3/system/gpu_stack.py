"""The parts that OpenVINO needs to see an Intel GPU, and which of them are missing. OpenVINO is not used here.

OpenVINO lists a GPU only if all of these are present: the OpenCL loader, Intel's OpenCL driver behind it, a render node
of the kernel, and the permission to open that node. If a part is missing, OpenVINO reports no GPU and gives no reason.
This module gives the reason. All questions about the machine go through `Probe`, which tests can replace.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ov_phi3.files import text_or_empty

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Obstacle", "Probe", "explain_missing_gpu", "gpu_obstacles"]

_INTEL_PCI_VENDOR = "0x8086"

_INSTALL_LOADER = "sudo apt-get install ocl-icd-libopencl1"
_INSTALL_DRIVER = "sudo apt-get install intel-opencl-icd"
_INSTALL_WINDOWS_DRIVER = (
    "install the graphics driver from intel.com (Intel Driver & Support Assistant finds it) and restart"
)


@dataclass(frozen=True)
class Obstacle:
    """One reason why OpenVINO cannot see a GPU.

    Attributes:
        layer: "loader", "driver", "node", "permission" or "platform".
        problem: description of the missing part.
        fix: how to fix it, as a command if there is one.
    """

    layer: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem} -> {self.fix}"


def _can_read_and_write(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def _load_library(name: str) -> None:
    ctypes.CDLL(name)


@dataclass(frozen=True)
class Probe:
    """Questions about the machine.

    Attributes:
        root: root of the file system to look at (Linux).
        platform: as `sys.platform`: "linux", "win32" or "darwin".
        load_library: loads a shared library by name; raises `OSError` on failure.
        can_open: whether this process may read and write a device node.
    """

    root: Path = Path("/")
    platform: str = sys.platform
    load_library: Callable[[str], None] = _load_library
    can_open: Callable[[Path], bool] = _can_read_and_write

    def opencl_loader_error(self) -> str:
        """The error of loading the OpenCL loader, or '' if it loads."""
        try:
            self.load_library("OpenCL.dll" if self.platform == "win32" else "libOpenCL.so.1")
        except OSError as error:
            return str(error)
        return ""

    def opencl_vendors(self) -> list[Path]:
        """The files that name the installed OpenCL drivers (Linux)."""
        return sorted((self.root / "etc/OpenCL/vendors").glob("*.icd"))

    def intel_opencl_vendors(self) -> list[Path]:
        """The files of `opencl_vendors` that belong to Intel's GPU driver."""
        return [path for path in self.opencl_vendors() if _names_intel_gpu_driver(path)]

    def render_nodes(self) -> list[Path]:
        """The kernel's GPU nodes: /dev/dri/renderD*, and /dev/dxg under WSL."""
        nodes = sorted((self.root / "dev/dri").glob("renderD*"))
        dxg = self.root / "dev/dxg"
        return [*nodes, dxg] if dxg.exists() else nodes

    def is_intel(self, node: Path) -> bool:
        """Whether a render node is an Intel GPU; True if the kernel does not name the vendor."""
        vendor = text_or_empty(self.root / "sys/class/drm" / node.name / "device/vendor").strip()
        return vendor in ("", _INTEL_PCI_VENDOR)

    def kernel_module(self, node: Path) -> str:
        """Name and version of the kernel driver of a render node ("xe", "i915 1.25"), or '' if not visible."""
        link = self.root / "sys/class/drm" / node.name / "device/driver"
        if not link.exists():
            return ""
        name = link.resolve().name
        version = text_or_empty(self.root / "sys/module" / name / "version").strip()
        return f"{name} {version}".strip()

    def group_of(self, node: Path) -> str:
        """The group that owns a render node, or "render" if the group has no name here."""
        try:
            return node.group()
        except (KeyError, OSError, NotImplementedError):
            return "render"


def _names_intel_gpu_driver(vendor: Path) -> bool:
    library = text_or_empty(vendor)  # libigdrcl.so is the GPU driver; libintelocl.so is Intel's OpenCL for CPUs
    return "igdrcl" in library or ("intel" in vendor.name and "intelocl" not in library)


def gpu_obstacles(probe: Probe | None = None) -> list[Obstacle]:
    """The missing parts that keep OpenVINO from seeing an Intel GPU on this machine, in the order of fixing them.

    The list is empty if every part is present. OpenVINO may still find no GPU then, for example with a driver that is
    too old for the GPU.
    """
    probe = probe or Probe()
    if probe.platform == "darwin":
        return [Obstacle("platform", "OpenVINO has no GPU plugin for macOS", "use device='CPU'")]
    if probe.platform == "win32":
        error = probe.opencl_loader_error()
        return [Obstacle("loader", f"OpenCL.dll does not load ({error})", _INSTALL_WINDOWS_DRIVER)] if error else []
    return [*_node_obstacles(probe), *_opencl_obstacles(probe)]


def explain_missing_gpu(probe: Probe | None = None) -> str:
    """Why OpenVINO sees no GPU and how to fix it, as one sentence that begins with "No GPU"."""
    obstacles = gpu_obstacles(probe)
    if not obstacles:
        return (
            "No GPU: all parts that OpenVINO needs are present, so the driver may be too old for this GPU or this "
            "OpenVINO; to fix: update the Intel graphics driver (on Debian and Ubuntu the package intel-opencl-icd)."
        )
    numbered = " ".join(f"({number}) {obstacle}." for number, obstacle in enumerate(obstacles, 1))
    return f"No GPU, because: {numbered}"


def _opencl_obstacles(probe: Probe) -> list[Obstacle]:
    obstacles = []
    error = probe.opencl_loader_error()
    if error:
        problem = f"the OpenCL loader libOpenCL.so.1 does not load ({error})"
        obstacles.append(Obstacle("loader", problem, _INSTALL_LOADER))
    if not probe.intel_opencl_vendors():
        others = ", ".join(path.name for path in probe.opencl_vendors())
        files = f"only {others} in" if others else "no .icd file in"
        problem = f"no Intel OpenCL driver: {files} /etc/OpenCL/vendors"
        obstacles.append(Obstacle("driver", problem, _INSTALL_DRIVER))
    return obstacles


def _node_obstacles(probe: Probe) -> list[Obstacle]:
    nodes = probe.render_nodes()
    if not nodes:
        fix = "check that the machine has an Intel GPU (lspci | grep -iE 'vga|display'); start a container with "
        return [Obstacle("node", "the kernel shows no GPU: no /dev/dri/renderD*", fix + "--device /dev/dri")]
    intel = [node for node in nodes if probe.is_intel(node)]
    if not intel:
        names = ", ".join(node.name for node in nodes)
        return [Obstacle("node", f"no Intel GPU: {names} belong to another vendor", "use device='CPU'")]
    if any(probe.can_open(node) for node in intel):
        return []
    groups = " ".join(sorted({probe.group_of(node) for node in intel}))
    names = ", ".join(node.name for node in intel)
    fix = f"sudo usermod -aG {groups.replace(' ', ',')} $USER, then log in again (a container: --group-add {groups})"
    return [Obstacle("permission", f"no permission to open {names} (group {groups})", fix)]
