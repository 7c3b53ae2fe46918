"""The machine and the package versions that a measurement depends on."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ov_phi3._version import __version__
from ov_phi3.files import text_or_empty
from ov_phi3.system import versions
from ov_phi3.system.memory import machine_memory

__all__ = ["Machine", "cpu_name", "physical_cores"]


@dataclass(frozen=True, slots=True)
class Machine:
    """The conditions of a measurement, besides the model and the settings.

    Attributes:
        cpu: the processor's name.
        cores: physical cores; None if the system does not report them.
        logical_cpus: logical processors that this process may use.
        memory_bytes: physical memory, in a container at most its limit; None if the system does not report it.
        system: operating system and release.
        python: version of Python.
        packages: versions of this library and of the packages that it runs on.
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
        cpuinfo = text_or_empty(Path("/proc/cpuinfo"))
        memory = machine_memory()
        return cls(
            cpu=cpu_name(cpuinfo),
            cores=physical_cores(cpuinfo),
            logical_cpus=_usable_cpus(),
            memory_bytes=None if memory is None else memory.total,
            system=platform.platform(),
            python=platform.python_version(),
            packages={"ov-phi3": __version__, **versions.installed()},
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        cores = f"{self.cores} cores, " if self.cores else ""
        return f"{self.cpu}, {cores}{self.logical_cpus} usable CPUs, {self.system}, Python {self.python}"


def _usable_cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo, or Python's name for it."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def physical_cores(cpuinfo: str) -> int | None:
    """Number of distinct pairs of package and core in the text of /proc/cpuinfo; None if it lists none."""
    cores = set()
    for processor in cpuinfo.split("\n\n"):
        matches = [re.search(rf"^{name}\s*:\s*(\d+)$", processor, re.MULTILINE) for name in ("physical id", "core id")]
        if all(matches):
            cores.add(tuple(match[1] for match in matches if match))
    return len(cores) or None
