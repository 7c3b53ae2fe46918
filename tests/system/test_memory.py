"""Memory of the machine and of this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ov_phi3.system.memory import Memory, machine_memory


def write_meminfo(root: Path, **kib: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text("".join(f"{name}: {value:>10} kB\n" for name, value in kib.items()))


def write_limit(root: Path, limit: str, used: int = 0, cached: int = 0) -> None:
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def test_memory_of_the_machine_and_of_a_container(tmp_path: Path) -> None:
    assert machine_memory(tmp_path, "linux") is None
    write_meminfo(tmp_path, MemTotal=1000, MemAvailable=600, HugePages_Total=0)
    memory = Memory(1024000, 614400)
    assert machine_memory(tmp_path, "linux") == memory
    write_limit(tmp_path, "max")
    assert machine_memory(tmp_path, "linux") == memory
    write_limit(tmp_path, "500000", used=100000)
    assert machine_memory(tmp_path, "linux") == Memory(500000, 400000)


def test_cached_files_of_a_container_count_as_available(tmp_path: Path) -> None:
    write_meminfo(tmp_path, MemTotal=1000, MemAvailable=600)
    write_limit(tmp_path, "500000", used=450000, cached=50000)
    assert machine_memory(tmp_path, "linux") == Memory(500000, 100000)


def test_swap_counts_within_the_limit_of_a_container(tmp_path: Path) -> None:
    write_meminfo(tmp_path, MemTotal=1000, MemAvailable=600, SwapTotal=200, SwapFree=100)
    assert machine_memory(tmp_path, "linux") == Memory(1024000, 614400, 1228800, 716800)
    write_limit(tmp_path, "1100000", used=500000)
    assert machine_memory(tmp_path, "linux") == Memory(1024000, 600000, 1100000, 600000)


@pytest.mark.skipif(not sys.platform.startswith(("linux", "win32")), reason="no source of memory figures elsewhere")
def test_real_memory() -> None:
    memory = machine_memory()
    assert memory is not None
    assert 0 < memory.available <= memory.total


@pytest.mark.skipif(sys.platform != "linux", reason="swap space is known on Linux only")
def test_real_memory_with_swap() -> None:
    memory = machine_memory()
    assert memory is not None
    assert memory.total_with_swap is not None
    assert memory.available_with_swap is not None
    assert memory.total_with_swap >= memory.available_with_swap > 0
    assert memory.total_with_swap >= memory.total
