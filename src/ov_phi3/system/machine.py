"""What the machine says about itself, without OpenVINO: its GPU stack, its memory, and what a figure depends on.

OpenVINO names a GPU only when the whole way to it is there: the OpenCL loader, Intel's OpenCL driver behind it, a
render node of the kernel, and the permission to open it. When one is missing it reports no GPU and does not say why;
this module does. Every question goes through `Probe`, so that a test can answer in the machine's place.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3._version import __version__
from ov_phi3.system import versions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Machine",
    "Memory",
    "Obstacle",
    "Probe",
    "gpu_obstacles",
    "peak_memory_bytes",
    "resident_memory_bytes",
    "text_of",
]

_INTEL_PCI_VENDOR = "0x8086"

INSTALL_LOADER = "sudo apt-get install ocl-icd-libopencl1"
INSTALL_DRIVER = "sudo apt-get install intel-opencl-icd"
WINDOWS_DRIVER = "install the graphics driver from intel.com (Intel Driver & Support Assistant finds it) and restart"


@dataclass(frozen=True)
class Memory:
    """The machine's memory, in bytes; in a container, at most what the container may use."""

    total: int
    available: int


@dataclass(frozen=True)
class Obstacle:
    """One thing that keeps OpenVINO from seeing a GPU.

    Attributes:
        layer: "loader", "driver", "node", "permission" or "platform".
        what: what was found.
        fix: what to do about it, a command where there is one.

    """

    layer: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} -> {self.fix}"


def _open_for_both(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def text_of(path: Path) -> str:
    """What a file says, '' when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _load_library(name: str) -> None:
    ctypes.CDLL(name)


@dataclass(frozen=True)
class Probe:
    """The questions asked of the machine.

    Attributes:
        root: the root of the file system that is looked at (Linux).
        platform: as `sys.platform`: "linux", "win32" or "darwin".
        load_library: loads a shared library by name, `OSError` when it cannot.
        can_open: whether this process may read and write a device node.

    """

    root: Path = Path("/")
    platform: str = sys.platform
    load_library: Callable[[str], None] = _load_library
    can_open: Callable[[Path], bool] = _open_for_both

    def opencl_loader_error(self) -> str:
        """Why the OpenCL loader does not load, or '' when it does."""
        try:
            self.load_library("OpenCL.dll" if self.platform == "win32" else "libOpenCL.so.1")
        except OSError as error:
            return str(error)
        return ""

    def opencl_vendors(self) -> list[Path]:
        """The files that tell the OpenCL loader which drivers there are (Linux)."""
        return sorted((self.root / "etc/OpenCL/vendors").glob("*.icd"))

    def intel_opencl_vendors(self) -> list[Path]:
        """Those of `opencl_vendors` that belong to Intel's GPU driver."""
        return [path for path in self.opencl_vendors() if self._is_intel_gpu_driver(path)]

    def _is_intel_gpu_driver(self, vendor: Path) -> bool:
        library = text_of(vendor)  # libigdrcl.so is the GPU driver; libintelocl.so is Intel's OpenCL for CPUs
        return "igdrcl" in library or ("intel" in vendor.name and "intelocl" not in library)

    def render_nodes(self) -> list[Path]:
        """The kernel's GPU nodes: /dev/dri/renderD*, or /dev/dxg under WSL."""
        nodes = sorted((self.root / "dev/dri").glob("renderD*"))
        dxg = self.root / "dev/dxg"
        return [*nodes, dxg] if dxg.exists() else nodes

    def is_intel(self, node: Path) -> bool:
        """Whether a render node is an Intel GPU; True when the kernel does not tell."""
        vendor = text_of(self.root / "sys/class/drm" / node.name / "device/vendor").strip()
        return vendor in ("", _INTEL_PCI_VENDOR)

    def kernel_module(self, node: Path) -> str:
        """Name and version of the kernel driver of a render node ("xe", "i915 1.25"), '' when not visible."""
        link = self.root / "sys/class/drm" / node.name / "device/driver"
        if not link.exists():
            return ""
        name = link.resolve().name
        version = text_of(self.root / "sys/module" / name / "version").strip()
        return f"{name} {version}".strip()

    def group_of(self, node: Path) -> str:
        """The group that owns a render node, "render" when it has no name here."""
        try:
            return node.group()
        except (KeyError, OSError, NotImplementedError):
            return "render"

    def memory(self) -> Memory | None:
        """Total and available memory, None when the machine does not tell."""
        return _windows_memory() if self.platform == "win32" else self._linux_memory()

    def _linux_memory(self) -> Memory | None:
        fields = {}
        for line in text_of(self.root / "proc/meminfo").splitlines():
            name, _, value = line.partition(":")
            kib = value.split()[:1]
            if kib and kib[0].isdigit():
                fields[name] = int(kib[0]) * 1024
        if "MemTotal" not in fields:
            return None
        total = fields["MemTotal"]
        available = fields.get("MemAvailable", total)
        cgroup = self.root / "sys/fs/cgroup"
        limit = text_of(cgroup / "memory.max").strip()
        used = text_of(cgroup / "memory.current").strip()
        if limit.isdigit():
            total = min(total, int(limit))
            # Cached files count as used, and are given up when memory is needed.
            cached = re.search(r"^inactive_file (\d+)$", text_of(cgroup / "memory.stat"), re.MULTILINE)
            taken = int(used if used.isdigit() else 0) - int(cached[1] if cached else 0)
            available = min(available, max(0, int(limit) - taken))
        return Memory(total, available)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("unused", ctypes.c_uint64 * 5),
    ]


def _windows_memory() -> Memory | None:
    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return Memory(int(status.total), int(status.available))


def gpu_obstacles(probe: Probe | None = None) -> list[Obstacle]:
    """What keeps OpenVINO from seeing an Intel GPU on this machine, the first thing to mend first.

    Empty when every part is in place; OpenVINO may still find no GPU then, for example with a driver too old for it.
    """
    probe = probe or Probe()
    if probe.platform == "darwin":
        return [Obstacle("platform", "OpenVINO has no GPU plugin for macOS", "use device='CPU'")]
    if probe.platform == "win32":
        error = probe.opencl_loader_error()
        return [Obstacle("loader", f"OpenCL.dll does not load ({error})", WINDOWS_DRIVER)] if error else []
    return [*_node_obstacles(probe), *_opencl_obstacles(probe)]


def _opencl_obstacles(probe: Probe) -> list[Obstacle]:
    found = []
    error = probe.opencl_loader_error()
    if error:
        found.append(Obstacle("loader", f"the OpenCL loader libOpenCL.so.1 does not load ({error})", INSTALL_LOADER))
    if not probe.intel_opencl_vendors():
        others = ", ".join(path.name for path in probe.opencl_vendors())
        seen = f"only {others} in" if others else "no .icd file in"
        found.append(Obstacle("driver", f"no Intel OpenCL driver: {seen} /etc/OpenCL/vendors", INSTALL_DRIVER))
    return found


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


@dataclass(frozen=True, slots=True)
class Machine:
    """What a figure depends on besides the model and the settings.

    Attributes:
        cpu: the processor's name.
        cores: physical cores; None where the system does not tell.
        logical_cpus: processors that this process may use.
        memory_bytes: memory, in a container at most what it may use; None where the system does not tell.
        system: operating system and release.
        python: version of Python.
        packages: versions of the library and of the packages that it runs on.
    """

    cpu: str
    cores: int | None
    logical_cpus: int
    memory_bytes: int | None
    system: str
    python: str
    packages: dict[str, str | None]

    @classmethod
    def here(cls) -> Machine:
        """This machine, as this process sees it."""
        described = text_of(Path("/proc/cpuinfo"))
        memory = Probe().memory()
        return cls(
            cpu=_cpu_name(described),
            cores=_physical_cores(described),
            logical_cpus=_usable_cpus(),
            memory_bytes=None if memory is None else memory.total,
            system=platform.platform(),
            python=platform.python_version(),
            packages={"ov-phi3": __version__, **versions.installed()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        cores = f"{self.cores} cores, " if self.cores else ""
        return f"{self.cpu}, {cores}{self.logical_cpus} usable CPUs, {self.system}, Python {self.python}"


def resident_memory_bytes() -> int | None:
    """Memory of this process now, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_process("WorkingSetSize")
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had so far, in bytes; None where the system does not tell.

    The operating system keeps this figure by itself: nothing is sampled, so that reading it costs a measurement
    nothing.
    """
    if sys.platform == "win32":
        return _windows_process("PeakWorkingSetSize")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    """A figure of /proc/self/status, which Linux gives in KiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text_of(Path("/proc/self/status")), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows API."""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("unused", ctypes.c_size_t * 6),
    ]


def _windows_process(name: str) -> int | None:
    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    counters = _ProcessMemory(cb=ctypes.sizeof(_ProcessMemory))
    process = ctypes.c_void_p(-1)  # the pseudo-handle of this process
    if not windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb):
        return None
    return int(getattr(counters, name))


def _usable_cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name(described: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _physical_cores(described: str) -> int | None:
    """Distinct pairs of package and core in /proc/cpuinfo."""
    places = set()
    for block in described.split("\n\n"):
        keys = [re.search(rf"^{name}\s*:\s*(\d+)$", block, re.MULTILINE) for name in ("physical id", "core id")]
        if all(keys):
            places.add(tuple(key[1] for key in keys if key))
    return len(places) or None
