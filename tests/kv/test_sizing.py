"""Planned size of the KV cache, by device, memory and arguments."""

from __future__ import annotations

import pytest

from ov_phi3 import ConfigError, DeviceInfo, Pipeline
from ov_phi3.backends.llm_pipeline import with_scheduler
from ov_phi3.kv.sizing import plan_kv_cache
from ov_phi3.system.memory import Memory

CPU = DeviceInfo("CPU", "a CPU", "CPU")
GPU = DeviceInfo("GPU.0", "a GPU", "GPU")
NPU = DeviceInfo("NPU", "an NPU", "NPU")
GIB = 2**30


class TestPlan:
    def test_one_conversation_on_the_cpu(self, pipe: Pipeline) -> None:
        kv = plan_kv_cache(pipe.info, CPU, {}, memory=Memory(64 * GIB, 64 * GIB))
        assert (kv.context_length, kv.num_blocks) == (8192, 257)
        assert with_scheduler({}, kv)["scheduler_config"].num_kv_blocks == 257
        assert plan_kv_cache(pipe.info, CPU, {}, context_length=100, memory=Memory(GIB, GIB)).num_blocks == 5

    def test_grows_on_a_gpu(self, pipe: Pipeline) -> None:
        kv = plan_kv_cache(pipe.info, GPU, {})
        assert (kv.context_length, kv.num_blocks, kv.paged) == (8192, 0, True)
        limited = plan_kv_cache(pipe.info, GPU, {"KV_CACHE_PRECISION": "f16"}, kv_cache_gb=0.1)
        assert limited.num_blocks == int(0.1 * GIB / (pipe.info.kv_bytes_per_token * 16))
        assert limited.context_length == (limited.num_blocks - 1) * 16

    @pytest.mark.parametrize("precision", ["u8", "i8", "U4", "int8_t"])
    def test_float32_on_a_gpu_has_no_integer_cache(self, pipe: Pipeline, precision: str) -> None:
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": precision}
        with pytest.raises(ConfigError, match="KV_CACHE_PRECISION=.* does not work on GPU.0 .*float32"):
            plan_kv_cache(pipe.info, GPU, exact)
        plan_kv_cache(pipe.info, CPU, exact, memory=Memory(64 * GIB, 64 * GIB))
        plan_kv_cache(pipe.info, GPU, {"KV_CACHE_PRECISION": precision})

    @pytest.mark.parametrize(("planned", "properties"), [(NPU, {}), (CPU, {"ATTENTION_BACKEND": "SDPA"})])
    def test_no_scheduler_without_paged_attention(
        self, pipe: Pipeline, planned: DeviceInfo, properties: dict[str, str]
    ) -> None:
        kv = plan_kv_cache(pipe.info, planned, properties)
        assert (kv.context_length, kv.paged) == (8192, False)
        assert "scheduler_config" not in with_scheduler(properties, kv)
        assert plan_kv_cache(pipe.info, planned, properties, kv_cache_gb=0.01).context_length < 1000

    def test_little_memory_shortens_the_window(self, pipe: Pipeline) -> None:
        kv = plan_kv_cache(pipe.info, CPU, {}, memory=Memory(GIB, GIB // 4))
        assert kv.context_length < 8192
        assert kv.num_blocks * kv.layout.block_bytes(pipe.info) < GIB // 8
        assert "memory" in kv.reason
        assert "8192" in kv.warnings[0]

    def test_a_window_that_memory_cannot_hold(self, pipe: Pipeline) -> None:
        with pytest.raises(ConfigError, match=r"context_length=8192 needs 0\.1 GiB .*at most \d+ tokens"):
            plan_kv_cache(pipe.info, CPU, {}, context_length=8192, memory=Memory(GIB, GIB // 5))

    def test_the_callers_own_scheduler(self, pipe: Pipeline) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 11
        kv = plan_kv_cache(pipe.info, CPU, {"scheduler_config": scheduler})
        assert (kv.context_length, kv.paged) == (320, False)
        with pytest.raises(ConfigError, match="give one of them"):
            plan_kv_cache(pipe.info, CPU, {"scheduler_config": scheduler}, kv_cache_gb=1)
