"""OpenVINO's exceptions become errors of this library, with advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import CPU, DGPU, IGPU, NPU, gpu_probe

import ov_phi3
from ov_phi3.errors import ConfigError, DeviceError, GenerationError, ModelError
from ov_phi3.system.devices import DeviceInfo, devices, resolve
from ov_phi3.system.failures import essential_message, to_device_error, to_generation_error, to_load_error

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
    ("message", "device", "words"),
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
def test_a_failure_becomes_a_device_error_with_advice(
    tmp_path: Path, message: str, device: DeviceInfo | str, words: str
) -> None:
    error = to_device_error(RuntimeError(message), device, gpu_probe(tmp_path, loader=False))
    assert type(error) is DeviceError
    assert words in str(error)
    assert str(device) in str(error)
    assert "Exception from" not in str(error)
    assert "\n" not in str(error)


def test_memory_errors_get_advice_and_own_errors_pass_through() -> None:
    assert "Not enough memory" in str(to_device_error(MemoryError(), CPU))
    own = DeviceError("x")
    assert to_device_error(own, CPU) is own


@pytest.mark.parametrize(
    "config", [{"FOO": 1}, {"PERFORMANCE_HINT": "FASTEST"}, {"NUM_STREAMS": "x"}, {"INFERENCE_NUM_THREADS": -3}]
)
def test_a_property_that_the_real_cpu_refuses_is_a_config_error(config: dict[str, Any]) -> None:
    import openvino

    parameter = openvino.opset13.parameter([1], openvino.Type.f32)
    model = openvino.Model([openvino.opset13.relu(parameter)], [parameter], "relu")
    with pytest.raises(RuntimeError) as caught:
        openvino.Core().compile_model(model, "CPU", config)
    error = to_device_error(caught.value, resolve("CPU"))
    assert isinstance(error, ConfigError)
    assert "does not accept a property" in str(error)


@pytest.mark.parametrize("cache", ["KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION"])
def test_precisions_that_contradict_each_other_are_a_config_error(tiny_fp32: Path, device: str, cache: str) -> None:
    if device != "CPU":
        pytest.skip("a GPU has no such limit")
    with pytest.raises(ConfigError, match=rf"precision of the KV cache.*{cache}.*INFERENCE_PRECISION_HINT"):
        config = {cache: "bf16", "INFERENCE_PRECISION_HINT": "f32"}
        ov_phi3.load(tiny_fp32, device=device, backend="infer_request", ov_config=config)


def test_the_real_failure_of_a_machine_without_a_gpu(tmp_path: Path) -> None:
    import openvino

    if any(info.kind == "GPU" for info in devices()):
        pytest.skip("this machine has a GPU")
    parameter = openvino.opset13.parameter([1], openvino.Type.f32)
    model = openvino.Model([openvino.opset13.relu(parameter)], [parameter], "relu")
    with pytest.raises(RuntimeError) as caught:
        openvino.Core().compile_model(model, "GPU.0")
    error = to_device_error(caught.value, "GPU.0", gpu_probe(tmp_path, node=False))
    assert isinstance(error, DeviceError)
    assert "No GPU, because: (1) the kernel shows no GPU" in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Exception from src/x.cpp:1:\nout of luck", "out of luck."),
        (
            "Exception from a.cpp:1:\nCheck 'v > 0' failed at b.hpp:58:\nWrong value. Got: -3\n\n",
            "Wrong value. Got: -3.",
        ),
        ("Check 'v > 0' failed at b.hpp:58: out of luck", "out of luck."),
        ("loading failed. Error: Exception from y.cpp:22:\nCannot load", "loading failed. Error: Cannot load."),
        ("[12:34:56] /src/regex.cc:75: Regex parsing error", "Regex parsing error."),
        ("two\nlines", "two lines."),
        ("out of luck!", "out of luck!"),
        ("Check 'v > 0' failed at b.hpp:58:\n", "Check 'v > 0' failed at b.hpp:58:."),
        ("", "RuntimeError."),
    ],
)
def test_the_essential_message_has_no_source_locations(text: str, message: str) -> None:
    assert essential_message(RuntimeError(text)) == message


def test_a_failure_while_generating() -> None:
    error = to_generation_error(RuntimeError("Exception from src/x.cpp:1:\nout of luck"))
    assert type(error) is GenerationError
    assert str(error) == "the engine failed: out of luck. The pipeline can still be used."
    error = to_generation_error(RuntimeError("[12:34:56] /src/regex.cc:75: Regex parsing error"), "regex")
    assert type(error) is ConfigError
    assert str(error) == "regex was not accepted: Regex parsing error."
    error = to_generation_error(RuntimeError("std::bad_alloc"), "json_schema")  # not the schema's fault
    assert type(error) is GenerationError


def test_a_failure_while_loading_a_damaged_file_is_a_model_error(tmp_path: Path) -> None:
    model = tmp_path / "openvino_model.xml"
    model.write_text("<net")
    error = to_load_error(RuntimeError("out of luck"), model, CPU)
    assert type(error) is ModelError
    assert str(error).startswith(f"{model} is damaged")
    assert "Exception from" not in str(error)


def test_a_failure_while_loading_a_sound_file(demo_int4: Path) -> None:
    model = demo_int4 / "openvino_model.xml"
    assert type(to_load_error(RuntimeError("out of luck"), model, CPU)) is DeviceError
    assert type(to_load_error(RuntimeError("Unsupported property FOO"), model, CPU)) is ConfigError
