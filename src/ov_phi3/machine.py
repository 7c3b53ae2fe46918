"""The machine that something was measured on, and the memory that this process takes of it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ov_phi3 import host, versions
from ov_phi3._version import __version__

__all__ = ["Machine", "peak_memory_bytes", "resident_memory_bytes"]


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
        described = host.text_of(Path("/proc/cpuinfo"))
        memory = host.Probe().memory()
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
        return _windows_memory("WorkingSetSize")
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had so far, in bytes; None where the system does not tell.

    The operating system keeps this figure by itself: nothing is sampled, so that reading it costs a measurement
    nothing.
    """
    if sys.platform == "win32":
        return _windows_memory("PeakWorkingSetSize")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    """A figure of /proc/self/status, which Linux gives in KiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", host.text_of(Path("/proc/self/status")), re.MULTILINE)
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


def _windows_memory(name: str) -> int | None:
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
