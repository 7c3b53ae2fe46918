"""OpenVINO properties: the latency defaults, and the properties that a user sets over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import CPU, DGPU, NPU

from ov_phi3.errors import ConfigError
from ov_phi3.system.devices import resolve
from ov_phi3.system.properties import latency_properties, merge_config


def test_default_properties() -> None:
    expected = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
    assert latency_properties(CPU) == latency_properties(DGPU) == expected
    assert latency_properties(NPU) == {"PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": ""}


def test_merging_with_the_properties_of_the_real_cpu() -> None:
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
    ("key", "words"),
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
def test_a_key_that_the_real_cpu_does_not_have_is_refused(key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_config(resolve("CPU"), {key: "1"})
    assert words in str(caught.value)


def test_keys_of_gpus_and_npus() -> None:
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
