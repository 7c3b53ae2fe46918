"""Device names, what is missing when one is not there, properties, and OpenVINO's errors in plain words."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ov_phi3.errors import ConfigError, DeviceError
from ov_phi3.system.devices import (
    DeviceInfo,
    devices,
    explain_device_failure,
    hint,
    latency_properties,
    merge_config,
    resolve,
)
from ov_phi3.system.machine import Probe, gpu_obstacles

TEST_DEVICE = os.environ.get("OV_PHI3_TEST_DEVICE", "CPU")
CPU = DeviceInfo("CPU", "Intel(R) Core(TM) Ultra 7", "CPU", capabilities=("FP32", "INT8"))
IGPU = DeviceInfo("GPU.0", "Intel(R) Arc(TM) Graphics (iGPU)", "GPU", False, "24.35.30872", 28 << 30)
DGPU = DeviceInfo("GPU.1", "Intel(R) Arc(TM) A770 Graphics (dGPU)", "GPU", True, "24.35.30872", 16 << 30)
NPU = DeviceInfo("NPU", "Intel(R) AI Boost", "NPU", False, "1.8.0")
ALL = [CPU, IGPU, DGPU, NPU]


class FakeCore:
    """Answers as `openvino.Core` does on a machine with these properties."""

    def __init__(self, properties: dict[str, dict[str, Any]]) -> None:
        self.properties = properties
        self.available_devices = list(properties)

    def get_property(self, name: str, key: str) -> Any:
        if key not in self.properties[name]:
            raise RuntimeError(f"Exception from core.cpp:268:\nUnsupported property {key}")
        return self.properties[name][key]


def gpu_probe(
    root: Path,
    *,
    loader: bool = True,
    icd: bool = True,
    node: bool = True,
    allowed: bool = True,
    vendor: str = "0x8086",
) -> Probe:
    """A machine with an Intel GPU, one part of it missing at will."""
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


# -- listing -----------------------------------------------------------------------------------------------------------


def test_real_devices_hold_a_cpu_with_its_full_name() -> None:
    cpu = next(info for info in devices() if info.name == "CPU")
    assert cpu.kind == "CPU"
    assert len(cpu.full_name) > 3
    assert "FP32" in cpu.capabilities
    assert cpu.discrete is None
    assert cpu.driver is None
    assert str(cpu) == f"CPU ({cpu.full_name})"


def test_the_device_under_test_resolves_to_itself() -> None:
    info = resolve(TEST_DEVICE)
    assert info.name == {"GPU": "GPU.0"}.get(TEST_DEVICE, TEST_DEVICE)
    assert info in devices()


def test_importing_devices_does_not_import_openvino() -> None:
    code = (
        "import sys, ov_phi3.device, ov_phi3.doctor, ov_phi3.compile_cache\n"
        "sys.exit('openvino' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_single_gpu_is_told_as_gpu_0_with_all_its_properties() -> None:
    core = FakeCore(
        {
            "CPU": {"FULL_DEVICE_NAME": "Intel Xeon", "DEVICE_TYPE": "Type.INTEGRATED"},
            "GPU": {
                "FULL_DEVICE_NAME": "Intel(R) Arc(TM) A770 Graphics (dGPU)",
                "DEVICE_TYPE": "Type.DISCRETE",
                "GPU_DRIVER_VERSION": "24.35.30872.22",
                "GPU_DEVICE_TOTAL_MEM_SIZE": 17179869184,
                "OPTIMIZATION_CAPABILITIES": ["FP32", "FP16"],
                "DEVICE_UUID": "8680a056",
                "DEVICE_ARCHITECTURE": "GPU: vendor=0x8086 arch=v12.55.8",
            },
        }
    )
    cpu, gpu = devices(core)
    assert cpu == DeviceInfo("CPU", "Intel Xeon", "CPU")
    assert gpu == DeviceInfo(
        "GPU.0",
        "Intel(R) Arc(TM) A770 Graphics (dGPU)",
        "GPU",
        True,
        "24.35.30872.22",
        17179869184,
        ("FP32", "FP16"),
        "8680a056",
        "GPU: vendor=0x8086 arch=v12.55.8",
    )


def test_a_plugin_that_tells_nothing_still_gives_a_device() -> None:
    (npu,) = devices(FakeCore({"NPU": {}}))
    assert npu == DeviceInfo("NPU", "NPU", "NPU")


# -- resolving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("AUTO", ALL, DGPU),
        ("AUTO", [CPU, IGPU, NPU], IGPU),
        ("AUTO", [CPU, NPU], CPU),
        ("auto", [NPU, CPU], CPU),
        ("GPU", ALL, IGPU),
        ("GPU.0", ALL, IGPU),
        (" gpu.1 ", ALL, DGPU),
        ("cpu", ALL, CPU),
        ("NPU", ALL, NPU),
        ("NPU", [dataclasses.replace(NPU, name="NPU.3720")], dataclasses.replace(NPU, name="NPU.3720")),
        ("AUTO:GPU,CPU", ALL, DGPU),
        ("AUTO:GPU,CPU", [CPU], CPU),
        ("AUTO:CPU,GPU", ALL, CPU),
        ("AUTO:GPU.0, CPU", ALL, IGPU),
        ("AUTO:NPU,CPU", ALL, NPU),
    ],
)
def test_resolve(name: str, available: list[DeviceInfo], expected: DeviceInfo) -> None:
    assert resolve(name, available) == expected


@pytest.mark.parametrize("name", ["GPU.1", "GPU.0", "GPU", "NPU", "CPU.1", "GPU.0.1"])
def test_an_exact_name_is_never_replaced(name: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="is not there") as caught:
        resolve(name, [CPU], gpu_probe(tmp_path))
    assert "CPU (Intel(R) Core(TM) Ultra 7)" in str(caught.value)


def test_gpu_1_beside_gpu_0_names_what_is_there_and_no_missing_driver() -> None:
    with pytest.raises(DeviceError) as caught:
        resolve("GPU.1", [CPU, IGPU])
    assert "GPU.0 (Intel(R) Arc(TM) Graphics (iGPU))" in str(caught.value)
    assert "No GPU" not in str(caught.value)


def test_auto_never_takes_the_npu_in_silence() -> None:
    with pytest.raises(DeviceError, match="'AUTO' is not there"):
        resolve("AUTO", [NPU])


@pytest.mark.parametrize("name", ["HETERO:GPU,CPU", "MULTI:GPU,CPU", "BATCH:GPU(4)", "hetero"])
def test_virtual_devices_are_refused_with_what_is_accepted(name: str) -> None:
    with pytest.raises(ConfigError, match=r"one device runs the model\. Accepted: 'AUTO'"):
        resolve(name, ALL)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GPU0", "Did you mean 'GPU"),
        ("GPU:0", "Did you mean 'GPU"),
        ("cuda", "Accepted: 'AUTO'"),
        ("", "Accepted"),
        ("AUTO:", "Accepted"),
        ("AUTO:GPU,CPX", "Did you mean 'CPU'"),
        ("AUTO:-CPU", "excluded"),
        ("CPU;rm", "is not a device name"),
    ],
)
def test_garbage_is_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match="device") as caught:
        resolve(name, ALL)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", [None, 0, b"CPU", ["CPU"]])
def test_a_wrong_type_is_a_type_error(name: Any) -> None:
    with pytest.raises(TypeError, match="device must be a string"):
        resolve(name, ALL)


def test_hint_only_where_a_better_gpu_is_there() -> None:
    assert "device='GPU.1'" in hint(IGPU, ALL)
    assert DGPU.full_name in hint(IGPU, ALL)
    assert hint(DGPU, ALL) == ""
    assert hint(IGPU, [CPU, IGPU]) == ""
    assert hint(CPU, ALL) == ""
    assert hint(dataclasses.replace(IGPU, discrete=None), ALL) == ""


# -- why there is no GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "said", "fix"),
    [
        ({"loader": False}, "libOpenCL.so.1 does not load", "apt-get install ocl-icd-libopencl1"),
        ({"icd": False}, "no .icd file in /etc/OpenCL/vendors", "apt-get install intel-opencl-icd"),
        ({"node": False}, "no /dev/dri/renderD*", "--device /dev/dri"),
        ({"allowed": False}, "no permission to open renderD128", "sudo usermod -aG"),
        ({"vendor": "0x10de"}, "renderD128 belong to another vendor", "device='CPU'"),
    ],
)
def test_what_is_missing_for_a_gpu_is_named_with_the_command_that_mends_it(
    tmp_path: Path, missing: dict[str, Any], said: str, fix: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve("GPU.0", [CPU], gpu_probe(tmp_path, **missing))
    assert said in str(caught.value)
    assert fix in str(caught.value)
    assert len(gpu_obstacles(gpu_probe(tmp_path / "second", **missing))) == 1


def test_a_complete_machine_without_a_gpu_is_told_to_update_its_driver(tmp_path: Path) -> None:
    assert gpu_obstacles(gpu_probe(tmp_path / "a")) == []
    with pytest.raises(DeviceError, match="driver may be too old"):
        resolve("GPU.0", [CPU], gpu_probe(tmp_path / "b"))


def test_intels_cpu_runtime_is_not_a_gpu_driver(tmp_path: Path) -> None:
    probe = gpu_probe(tmp_path, icd=False)
    (tmp_path / "etc/OpenCL/vendors").mkdir(parents=True)
    (tmp_path / "etc/OpenCL/vendors/intel64.icd").write_text("/opt/intel/libintelocl.so\n")
    (obstacle,) = gpu_obstacles(probe)
    assert "only intel64.icd in /etc/OpenCL/vendors" in obstacle.what
    (tmp_path / "etc/OpenCL/vendors/other.icd").write_text("libigdrcl.so\n")
    assert gpu_obstacles(probe) == []


def test_wsl_has_its_own_node(tmp_path: Path) -> None:
    probe = gpu_probe(tmp_path, node=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").write_text("")
    assert gpu_obstacles(probe) == []


def test_windows_and_macos() -> None:
    def refuse(name: str) -> None:
        raise OSError(f"Could not find module {name!r}")

    (windows,) = gpu_obstacles(Probe(platform="win32", load_library=refuse))
    assert "OpenCL.dll" in windows.what
    assert "intel.com" in windows.fix
    assert gpu_obstacles(Probe(platform="win32", load_library=lambda _: None)) == []
    (mac,) = gpu_obstacles(Probe(platform="darwin"))
    assert "macOS" in mac.what


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_kernel_module_with_its_version(tmp_path: Path) -> None:
    probe = gpu_probe(tmp_path)
    node = probe.render_nodes()[0]
    assert probe.kernel_module(node) == ""
    (tmp_path / "sys/bus/pci/drivers/xe").mkdir(parents=True)
    (tmp_path / "sys/class/drm/renderD128/device/driver").symlink_to(tmp_path / "sys/bus/pci/drivers/xe")
    assert probe.kernel_module(node) == "xe"
    (tmp_path / "sys/module/xe").mkdir(parents=True)
    (tmp_path / "sys/module/xe/version").write_text("1.1.0\n")
    assert probe.kernel_module(node) == "xe 1.1.0"


def test_memory_of_the_machine_and_of_a_container(tmp_path: Path) -> None:
    probe = Probe(tmp_path, "linux")
    assert probe.memory() is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\nMemAvailable:    600 kB\nHugePages_Total:   0\n")
    memory = probe.memory()
    assert memory is not None
    assert (memory.total, memory.available) == (1024000, 614400)
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    assert probe.memory() == memory
    (cgroup / "memory.max").write_text("500000\n")
    (cgroup / "memory.current").write_text("100000\n")
    limited = probe.memory()
    assert limited is not None
    assert (limited.total, limited.available) == (500000, 400000)


@pytest.mark.skipif(not sys.platform.startswith(("linux", "win32")), reason="no source of memory figures elsewhere")
def test_real_memory() -> None:
    memory = Probe().memory()
    assert memory is not None
    assert 0 < memory.available <= memory.total


# -- properties --------------------------------------------------------------------------------------------------------


def test_latency_defaults() -> None:
    expected = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
    assert latency_properties(CPU) == latency_properties(DGPU) == expected
    assert latency_properties(NPU) == {"PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": ""}


def test_merge_with_the_real_plugin() -> None:
    cpu = resolve("CPU")
    assert merge_config(cpu) == latency_properties(cpu)
    merged = merge_config(cpu, {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "THROUGHPUT", "CACHE_DIR": Path("x")})
    assert merged == {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": "1",
        "CACHE_DIR": "x",
        "INFERENCE_NUM_THREADS": 1,
    }
    for key in (
        "ATTENTION_BACKEND",
        "scheduler_config",
        "prompt_lookup",
        "KV_CACHE_PRECISION",
        "CACHE_MODE",
        "ENABLE_MMAP",
    ):
        assert merge_config(cpu, {key: "x"})[key] == "x"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("NUM_STREMS", "Did you mean 'NUM_STREAMS'"),
        ("num_streams", "Did you mean 'NUM_STREAMS'"),
        ("attention_backend", "Did you mean 'ATTENTION_BACKEND'"),
        ("FOO", "is unknown on CPU"),
        ("FULL_DEVICE_NAME", "can only be read"),
        ("MAX_PROMPT_LEN", "is for the NPU"),
        ("GPU_ENABLE_LARGE_ALLOCATIONS", "is unknown on CPU"),
        ("DEVICE_ID", "choose the device with device="),
    ],
)
def test_a_key_that_is_not_for_the_real_cpu_is_named(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_config(resolve("CPU"), {key: "1"})
    assert said in str(caught.value)


def test_keys_of_the_gpu_and_the_npu() -> None:
    def supported(_: str) -> dict[str, str]:
        return {"INFERENCE_PRECISION_HINT": "RW", "FULL_DEVICE_NAME": "RO"}

    assert merge_config(DGPU, {"GPU_ENABLE_LARGE_ALLOCATIONS": True}, supported)["GPU_ENABLE_LARGE_ALLOCATIONS"] is True
    assert merge_config(NPU, {"MAX_PROMPT_LEN": 2048, "NPUW_DEVICES": "NPU"}, supported)["MAX_PROMPT_LEN"] == 2048
    with pytest.raises(ConfigError, match="Did you mean 'INFERENCE_PRECISION_HINT'"):
        merge_config(DGPU, {"INFERENCE_PRECISON_HINT": "f32"}, supported)


@pytest.mark.parametrize(
    "config", [[("NUM_STREAMS", 1)], "NUM_STREAMS", {1: 2}, {"NUM_STREAMS": None}, {"CACHE_DIR": 3}]
)
def test_wrong_types_in_ov_config(config: Any) -> None:
    with pytest.raises(TypeError, match="ov_config"):
        merge_config(CPU, config, lambda _: {"NUM_STREAMS": "RW"})


def test_every_merged_property_is_accepted_by_the_real_cpu(tmp_path: Path) -> None:
    import openvino

    parameter = openvino.opset13.parameter([1], openvino.Type.f32)
    model = openvino.Model([openvino.opset13.relu(parameter)], [parameter], "relu")
    config = merge_config(resolve("CPU"), {"CACHE_DIR": tmp_path, "CACHE_MODE": "OPTIMIZE_SPEED", "ENABLE_MMAP": False})
    assert openvino.Core().compile_model(model, "CPU", config) is not None


# -- OpenVINO's errors in plain words ----------------------------------------------------------------------------------

NO_LOADER = (
    "Exception from src/inference/src/cpp/core.cpp:117:\nCannot load library "
    '"/x/libopenvino_intel_gpu_plugin.so": libOpenCL.so.1: cannot open shared object file: No such file or directory\n'
)
NO_DEVICE = (
    "Exception from src/inference/src/cpp/core.cpp:117:\nException from src/inference/src/dev/plugin.cpp:112:\n"
    "Check '!m_device_map.empty()' failed at src/plugins/intel_gpu/src/plugin/plugin.cpp:559:\n"
    "[GPU] Can't get FULL_DEVICE_NAME property as no supported devices found or an error happened during devices "
    "query.\n"
)
TOO_LARGE = (
    "Check '!exceed_allocatable_mem_size' failed at src/plugins/intel_gpu/src/runtime/ocl/ocl_engine.cpp:115:\n"
    "[GPU] Exceeded max size of memory object allocation: requested 8589934592 bytes, but max alloc size supported by "
    "device is 4294959104 bytes."
)
RESOURCES = "Exception from infer_request.cpp:1:\n[GPU] CL_OUT_OF_RESOURCES exception.\n"
NPU_COMPILER = (
    "Exception from x.cpp:54:\nVCL compiler loading failed, aborting. Error: Exception from y.cpp:22:\nCannot load"
)
STALE = "[GPU] Cannot import compiled blob: it was built for a different runtime configuration"


@pytest.mark.parametrize(
    ("message", "device", "said"),
    [
        (NO_LOADER, "GPU.0", "ocl-icd-libopencl1"),
        (NO_DEVICE, "GPU.0", "ocl-icd-libopencl1"),
        (TOO_LARGE, IGPU, "GPU_ENABLE_LARGE_ALLOCATIONS"),
        (TOO_LARGE, IGPU, "shares the machine's memory"),
        (RESOURCES, DGPU, "restart the process"),
        ("std::bad_alloc", CPU, "Not enough memory"),
        (NPU_COMPILER, NPU, "NPU driver"),
        (STALE, DGPU, "delete the CACHE_DIR"),
        ('Device with "FOO" name is not registered in the OpenVINO Runtime', "FOO", "force-reinstall openvino"),
        ("something new", DGPU, "ov-phi3 doctor"),
        ("", DGPU, "RuntimeError"),
    ],
)
def test_failures_are_explained(tmp_path: Path, message: str, device: DeviceInfo | str, said: str) -> None:
    error = explain_device_failure(RuntimeError(message), device, gpu_probe(tmp_path, loader=False))
    assert type(error) is DeviceError
    assert said in str(error)
    assert str(device) in str(error)
    assert "Exception from" not in str(error)
    assert "\n" not in str(error)


def test_a_memory_error_and_our_own_errors() -> None:
    assert "Not enough memory" in str(explain_device_failure(MemoryError(), CPU))
    ours = DeviceError("x")
    assert explain_device_failure(ours, CPU) is ours


@pytest.mark.parametrize(
    "config", [{"FOO": 1}, {"PERFORMANCE_HINT": "FASTEST"}, {"NUM_STREAMS": "x"}, {"INFERENCE_NUM_THREADS": -3}]
)
def test_a_property_that_the_real_cpu_refuses_is_a_config_error(config: dict[str, Any]) -> None:
    import openvino

    parameter = openvino.opset13.parameter([1], openvino.Type.f32)
    model = openvino.Model([openvino.opset13.relu(parameter)], [parameter], "relu")
    with pytest.raises(RuntimeError) as caught:
        openvino.Core().compile_model(model, "CPU", config)
    error = explain_device_failure(caught.value, resolve("CPU"))
    assert isinstance(error, ConfigError)
    assert "does not accept a property" in str(error)


def test_the_real_failure_of_a_machine_without_a_gpu(tmp_path: Path) -> None:
    import openvino

    if any(info.kind == "GPU" for info in devices()):
        pytest.skip("this machine has a GPU")
    parameter = openvino.opset13.parameter([1], openvino.Type.f32)
    model = openvino.Model([openvino.opset13.relu(parameter)], [parameter], "relu")
    with pytest.raises(RuntimeError) as caught:
        openvino.Core().compile_model(model, "GPU.0")
    error = explain_device_failure(caught.value, "GPU.0", gpu_probe(tmp_path, node=False))
    assert isinstance(error, DeviceError)
    assert "No GPU, because: (1) the kernel shows no GPU" in str(error)
