"""Memory of the machine and of this process, read from the operating system."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ov_phi3.files import text_or_empty

__all__ = ["Memory", "machine_memory", "peak_memory_bytes", "resident_memory_bytes"]


@dataclass(frozen=True)
class Memory:
    """Memory of the machine, in bytes. In a container, no figure is larger than the container's limit.

    Attributes:
        total: physical memory.
        available: memory that a new process can use without swapping.
        total_with_swap: `total` and swap space; None if unknown (all systems but Linux).
        available_with_swap: `available` and free swap space; None if unknown.
    """

    total: int
    available: int
    total_with_swap: int | None = None
    available_with_swap: int | None = None


def machine_memory(root: Path = Path("/"), platform: str = sys.platform) -> Memory | None:
    """Memory of this machine, or None if the system does not report it.

    Args:
        root: root of the file system to look at (Linux).
        platform: as `sys.platform`.
    """
    return _windows_memory() if platform == "win32" else _linux_memory(root)


def _linux_memory(root: Path) -> Memory | None:
    sizes = {}
    for line in text_or_empty(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        kib = value.split()[:1]
        if kib and kib[0].isdigit():
            sizes[name] = int(kib[0]) * 1024
    if "MemTotal" not in sizes:
        return None
    total = sizes["MemTotal"]
    available = sizes.get("MemAvailable", total)
    limit, unused = _control_group(root / "sys/fs/cgroup")
    if not {"MemAvailable", "SwapTotal", "SwapFree"} <= sizes.keys():
        return Memory(_at_most(total, limit), _at_most(available, unused))
    return Memory(
        _at_most(total, limit),
        _at_most(available, unused),
        _at_most(total + sizes["SwapTotal"], limit),
        _at_most(available + sizes["SwapFree"], unused),
    )


def _at_most(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)


def _control_group(directory: Path) -> tuple[int | None, int | None]:
    """The memory limit of this control group (version 2) and the unused part of it, in bytes; None without a limit."""
    limit = text_or_empty(directory / "memory.max").strip()
    if not limit.isdigit():  # no control group, or "max"
        return None, None
    current = text_or_empty(directory / "memory.current").strip()
    # Cached files count as used, and are dropped when memory is needed.
    cached = re.search(r"^inactive_file (\d+)$", text_or_empty(directory / "memory.stat"), re.MULTILINE)
    used = int(current if current.isdigit() else 0) - int(cached[1] if cached else 0)
    return int(limit), max(0, int(limit) - used)


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


def resident_memory_bytes() -> int | None:
    """Resident memory of this process, in bytes; None if the system does not report it."""
    if sys.platform == "win32":
        return _windows_process("WorkingSetSize")
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far, in bytes; None if the system does not report it.

    The operating system keeps this figure. Nothing is sampled, so reading it does not disturb a measurement.
    """
    if sys.platform == "win32":
        return _windows_process("PeakWorkingSetSize")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    """A figure of /proc/self/status, which Linux gives in KiB."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", text_or_empty(Path("/proc/self/status")), re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


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
