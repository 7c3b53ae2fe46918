"""Listing the devices, and choosing one by name."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machines import ALL_DEVICES, CPU, DGPU, IGPU, NPU, gpu_probe

from ov_phi3.errors import ConfigError, DeviceError
from ov_phi3.system.devices import DeviceInfo, devices, hint, resolve

TEST_DEVICE = os.environ.get("OV_PHI3_TEST_DEVICE", "CPU")


class FakeCore:
    """Replaces `openvino.Core` on a machine with these devices and properties."""

    def __init__(self, properties: dict[str, dict[str, Any]]) -> None:
        self.properties = properties
        self.available_devices = list(properties)

    def get_property(self, name: str, key: str) -> Any:
        if key not in self.properties[name]:
            raise RuntimeError(f"Exception from core.cpp:268:\nUnsupported property {key}")
        return self.properties[name][key]


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
        "import sys, ov_phi3.system.devices, ov_phi3.system.failures, ov_phi3.doctor, ov_phi3.system.compile_cache\n"
        "sys.exit('openvino' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_single_gpu_is_named_gpu_0_and_has_all_its_properties() -> None:
    core = FakeCore(
        {
            "CPU": {"FULL_DEVICE_NAME": "Intel Xeon", "DEVICE_TYPE": "Type.INTEGRATED"},
            "GPU": {
                "FULL_DEVICE_NAME": "Intel(R) Arc(TM) A770 Graphics (dGPU)",
                "DEVICE_TYPE": "Type.DISCRETE",
                "GPU_DEVICE_TOTAL_MEM_SIZE": 17179869184,
                "OPTIMIZATION_CAPABILITIES": ["FP32", "FP16"],
                "DEVICE_UUID": "8680a056",
                "DEVICE_ARCHITECTURE": "GPU: vendor=0x8086 arch=v12.55.8",
            },
        }
    )
    cpu, gpu = devices(core, gpu_driver={"8680a056": "24.35.30872.22"}.get)
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


def test_a_plugin_without_any_property_still_gives_a_device() -> None:
    (npu,) = devices(FakeCore({"NPU": {}}))
    assert npu == DeviceInfo("NPU", "NPU", "NPU")


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("AUTO", ALL_DEVICES, DGPU),
        ("AUTO", [CPU, IGPU, NPU], IGPU),
        ("AUTO", [CPU, NPU], CPU),
        ("auto", [NPU, CPU], CPU),
        ("GPU", ALL_DEVICES, IGPU),
        ("GPU.0", ALL_DEVICES, IGPU),
        (" gpu.1 ", ALL_DEVICES, DGPU),
        ("cpu", ALL_DEVICES, CPU),
        ("NPU", ALL_DEVICES, NPU),
        ("NPU", [dataclasses.replace(NPU, name="NPU.3720")], dataclasses.replace(NPU, name="NPU.3720")),
        ("AUTO:GPU,CPU", ALL_DEVICES, DGPU),
        ("AUTO:GPU,CPU", [CPU], CPU),
        ("AUTO:CPU,GPU", ALL_DEVICES, CPU),
        ("AUTO:GPU.0, CPU", ALL_DEVICES, IGPU),
        ("AUTO:NPU,CPU", ALL_DEVICES, NPU),
    ],
)
def test_a_name_resolves_to_a_device(name: str, available: list[DeviceInfo], expected: DeviceInfo) -> None:
    assert resolve(name, available) == expected


@pytest.mark.parametrize("name", ["GPU.1", "GPU.0", "GPU", "NPU", "CPU.1", "GPU.0.1"])
def test_a_missing_device_is_never_replaced_by_another(name: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="does not exist here") as caught:
        resolve(name, [CPU], gpu_probe(tmp_path))
    assert "CPU (Intel(R) Core(TM) Ultra 7)" in str(caught.value)


def test_a_missing_second_gpu_lists_the_first_and_no_missing_driver() -> None:
    with pytest.raises(DeviceError) as caught:
        resolve("GPU.1", [CPU, IGPU])
    assert "GPU.0 (Intel(R) Arc(TM) Graphics (iGPU))" in str(caught.value)
    assert "No GPU" not in str(caught.value)


def test_auto_never_chooses_the_npu() -> None:
    with pytest.raises(DeviceError, match="'AUTO' does not exist here"):
        resolve("AUTO", [NPU])


@pytest.mark.parametrize("name", ["HETERO:GPU,CPU", "MULTI:GPU,CPU", "BATCH:GPU(4)", "hetero"])
def test_virtual_devices_are_refused_with_the_accepted_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"one device runs the model\. Accepted: 'AUTO'"):
        resolve(name, ALL_DEVICES)


@pytest.mark.parametrize(
    ("name", "words"),
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
def test_a_wrong_name_is_refused_with_a_suggestion(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match="device") as caught:
        resolve(name, ALL_DEVICES)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", [None, 0, b"CPU", ["CPU"]])
def test_a_wrong_type_is_a_type_error(name: Any) -> None:
    with pytest.raises(TypeError, match="device must be a string"):
        resolve(name, ALL_DEVICES)


def test_the_hint_appears_only_if_a_discrete_gpu_exists() -> None:
    assert "device='GPU.1'" in hint(IGPU, ALL_DEVICES)
    assert DGPU.full_name in hint(IGPU, ALL_DEVICES)
    assert hint(DGPU, ALL_DEVICES) == ""
    assert hint(IGPU, [CPU, IGPU]) == ""
    assert hint(CPU, ALL_DEVICES) == ""
    assert hint(dataclasses.replace(IGPU, discrete=None), ALL_DEVICES) == ""
