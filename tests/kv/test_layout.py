"""Bytes of a block of the KV cache: by precision, and measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ov_phi3 import ModelInfo, Pipeline
from ov_phi3.kv.layout import KVLayout, precision_name

GIB = 2**30


def info_of(pipe: Pipeline, **changes: Any) -> ModelInfo:
    return replace(pipe.info, **changes)


class TestLayout:
    @pytest.mark.parametrize(
        ("properties", "key", "value"),
        [
            ({}, "u8", "u8"),
            ({"KV_CACHE_PRECISION": "f16"}, "f16", "f16"),
            ({"KV_CACHE_PRECISION": "f16", "VALUE_CACHE_PRECISION": "u4"}, "f16", "u4"),
            ({"KV_CACHE_PRECISION": "u3"}, "f16", "f16"),
        ],
    )
    def test_precision(self, pipe: Pipeline, properties: dict[str, str], key: str, value: str) -> None:
        info = info_of(pipe, runtime_options={})
        layout = KVLayout.of(info, "CPU", properties)
        assert (layout.key, layout.value, layout.block_size) == (key, value, 32)
        assert KVLayout.of(info, "GPU", properties).block_size == 16

    @pytest.mark.parametrize(
        ("properties", "precision", "key_bytes", "value_bytes"),
        [
            ({}, "u4", 768, 576),
            ({"KV_CACHE_PRECISION": "i8"}, "i8", 1280, 1088),
            ({"KV_CACHE_PRECISION": "f16"}, "f16", 2048, 2048),
            ({"INFERENCE_PRECISION_HINT": "f32"}, "i8", 1536, 1152),
            ({"EXECUTION_MODE_HINT": "ACCURACY"}, "i8", 1536, 1152),
            ({"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}, "f32", 4096, 4096),
        ],
    )
    def test_a_block_of_one_head_on_a_gpu(
        self, pipe: Pipeline, properties: dict[str, str], precision: str, key_bytes: int, value_bytes: int
    ) -> None:
        """The sizes are those of the cache inputs of models that the GPU plugin has compiled."""
        info = info_of(pipe, runtime_options={}, head_dim=64, num_kv_heads=1, num_layers=1)
        layout = KVLayout.of(info, "GPU", properties)
        assert (layout.key, layout.value) == (precision, precision)
        assert layout.block_bytes(info) == key_bytes + value_bytes

    @pytest.mark.parametrize("spelling", ["i8", "I8", "int8_t", "<Type: 'int8_t'>"])
    def test_spellings_of_a_precision(self, pipe: Pipeline, spelling: str) -> None:
        assert KVLayout.of(pipe.info, "GPU", {"KV_CACHE_PRECISION": spelling}).key == "i8"
        assert precision_name(spelling) == "i8"

    def test_the_names_of_openvinos_types(self) -> None:
        import openvino

        for name in ("f32", "f16", "bf16", "u8", "i8", "u4", "i4"):
            assert precision_name(getattr(openvino.Type, name)) == name

    def test_precedence_of_property_export_and_device(self, pipe: Pipeline) -> None:
        exported = info_of(pipe, runtime_options={"KV_CACHE_PRECISION": "f16"})
        assert KVLayout.of(exported, "CPU", {}).key == "f16"
        assert KVLayout.of(exported, "CPU", {"KV_CACHE_PRECISION": "u8"}).key == "u8"
        assert KVLayout.of(exported, "GPU", {}).key == "f16"

    def test_float16_equals_the_models_own_figure(self, pipe: Pipeline) -> None:
        assert KVLayout(32, "f16", "f16").bytes_per_token(pipe.info) == pipe.info.kv_bytes_per_token
        assert KVLayout(32, "f32", "f32").bytes_per_token(pipe.info) == 2 * pipe.info.kv_bytes_per_token

    @pytest.mark.skipif(sys.platform != "linux", reason="reads the size of a process from /proc")
    @pytest.mark.parametrize(
        ("name", "properties"),
        [
            ("demo-int4", {}),
            ("demo-int4", {"KEY_CACHE_PRECISION": "u8", "VALUE_CACHE_PRECISION": "u4"}),
            ("demo-int4", {"VALUE_CACHE_GROUP_SIZE": "16"}),
            ("tiny-fp32", {}),
            ("tiny-fp32", {"KV_CACHE_PRECISION": "f16"}),
        ],
    )
    def test_equals_the_memory_that_the_engine_requests(
        self, name: str, properties: dict[str, str], demo_int4: Path, tiny_fp32: Path, device: str
    ) -> None:
        """Difference in address space between a cache and one of twice its size, each in a process of its own."""
        if device != "CPU":
            pytest.skip("only the CPU plugin takes memory of the process")
        path = {"demo-int4": demo_int4, "tiny-fp32": tiny_fp32}[name]
        info = ModelInfo.from_dir(path)
        defaults = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if name == "tiny-fp32" else {}
        size = KVLayout.of(info, "CPU", {**defaults, **properties}).block_bytes(info)
        blocks = 5 * GIB // 2 // size  # large enough that each layer's part is a mapping of its own
        taken = [_address_space(path, count, properties) for count in (blocks, 2 * blocks)]
        # A thread's heap takes 64 MiB of address space too.
        assert taken[1] - taken[0] == pytest.approx(blocks * size, rel=0.05)


_CHILD = """
import json, sys
from dataclasses import replace
import ov_phi3
from ov_phi3 import loading

path, blocks, properties = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
real = loading.plan_kv_cache

def plan_kv_cache(*args, **options):
    return replace(real(*args, **options), num_blocks=blocks, paged=True)

loading.plan_kv_cache = plan_kv_cache

def size():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))

with ov_phi3.load(path, device="CPU", ov_config=properties) as pipe:
    before = size()
    pipe.generate([5] * 40, max_new_tokens=2, ignore_eos=True)
    print(size() - before)
"""


def _address_space(path: Path, blocks: int, properties: dict[str, str]) -> int:
    command = [sys.executable, "-c", _CHILD, str(path), str(blocks), json.dumps(properties)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
