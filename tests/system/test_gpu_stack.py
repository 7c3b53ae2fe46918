"""The missing parts of a GPU stack are named, each with the command that installs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from machines import CPU, gpu_probe

from ov_phi3.errors import DeviceError
from ov_phi3.system.devices import resolve
from ov_phi3.system.gpu_stack import Probe, gpu_obstacles


@pytest.mark.parametrize(
    ("missing", "problem", "fix"),
    [
        ({"loader": False}, "libOpenCL.so.1 does not load", "apt-get install ocl-icd-libopencl1"),
        ({"icd": False}, "no .icd file in /etc/OpenCL/vendors", "apt-get install intel-opencl-icd"),
        ({"node": False}, "no /dev/dri/renderD*", "--device /dev/dri"),
        ({"allowed": False}, "no permission to open renderD128", "sudo usermod -aG"),
        ({"vendor": "0x10de"}, "renderD128 belong to another vendor", "device='CPU'"),
    ],
)
def test_a_missing_part_is_named_with_the_command_that_installs_it(
    tmp_path: Path, missing: dict[str, Any], problem: str, fix: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve("GPU.0", [CPU], gpu_probe(tmp_path, **missing))
    assert problem in str(caught.value)
    assert fix in str(caught.value)
    assert len(gpu_obstacles(gpu_probe(tmp_path / "second", **missing))) == 1


def test_with_all_parts_present_the_advice_is_to_update_the_driver(tmp_path: Path) -> None:
    assert gpu_obstacles(gpu_probe(tmp_path / "a")) == []
    with pytest.raises(DeviceError, match="driver may be too old"):
        resolve("GPU.0", [CPU], gpu_probe(tmp_path / "b"))


def test_intels_cpu_runtime_is_not_a_gpu_driver(tmp_path: Path) -> None:
    probe = gpu_probe(tmp_path, icd=False)
    (tmp_path / "etc/OpenCL/vendors").mkdir(parents=True)
    (tmp_path / "etc/OpenCL/vendors/intel64.icd").write_text("/opt/intel/libintelocl.so\n")
    (obstacle,) = gpu_obstacles(probe)
    assert "only intel64.icd in /etc/OpenCL/vendors" in obstacle.problem
    (tmp_path / "etc/OpenCL/vendors/other.icd").write_text("libigdrcl.so\n")
    assert gpu_obstacles(probe) == []


def test_the_node_of_wsl_counts(tmp_path: Path) -> None:
    probe = gpu_probe(tmp_path, node=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").write_text("")
    assert gpu_obstacles(probe) == []


def test_obstacles_on_windows_and_macos() -> None:
    def refuse(name: str) -> None:
        raise OSError(f"Could not find module {name!r}")

    (windows,) = gpu_obstacles(Probe(platform="win32", load_library=refuse))
    assert "OpenCL.dll" in windows.problem
    assert "intel.com" in windows.fix
    assert gpu_obstacles(Probe(platform="win32", load_library=lambda _: None)) == []
    (mac,) = gpu_obstacles(Probe(platform="darwin"))
    assert "macOS" in mac.problem


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_a_render_node_names_its_kernel_module_and_version(tmp_path: Path) -> None:
    probe = gpu_probe(tmp_path)
    node = probe.render_nodes()[0]
    assert probe.kernel_module(node) == ""
    (tmp_path / "sys/bus/pci/drivers/xe").mkdir(parents=True)
    (tmp_path / "sys/class/drm/renderD128/device/driver").symlink_to(tmp_path / "sys/bus/pci/drivers/xe")
    assert probe.kernel_module(node) == "xe"
    (tmp_path / "sys/module/xe").mkdir(parents=True)
    (tmp_path / "sys/module/xe/version").write_text("1.1.0\n")
    assert probe.kernel_module(node) == "xe 1.1.0"
