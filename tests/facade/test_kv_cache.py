"""The KV cache of a loaded model: its budget, its failures, and without paged attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import ContextOverflowError, ModelWarning

GIB = 2**30


class TestOnTheEngine:
    def test_a_budget_is_a_window(self, demo_int4: Path, device: str) -> None:
        gib = 0.005
        with ov_phi3.load(demo_int4, device=device, kv_cache_gb=gib) as small:
            window = small.context_length
            assert (window + 32) * small.engine.kv_plan.layout.bytes_per_token(small.info) <= gib * GIB
            with pytest.raises(
                ContextOverflowError, match=rf"window of {window} tokens \(what kv_cache_gb=0.005 holds"
            ):
                small.generate("x " * window)
            for start in (5, 6, 7):  # each fills the cache again
                result = small.generate([start] * (window - 40), ignore_eos=True)
                assert len(result.token_ids) == 40
            assert small.generate("What is the capital of France?", max_new_tokens=5).token_ids

    def test_a_cache_that_is_too_small_for_several_replies(self, demo_int4: Path, device: str) -> None:
        with ov_phi3.load(demo_int4, device=device, kv_cache_gb=0.003) as small:
            options: dict[str, Any] = {"num_return_sequences": 8, "temperature": 1.0, "ignore_eos": True}
            with pytest.raises(ContextOverflowError, match="8 replies of up to 60 tokens"):
                small.generate("Hi", max_new_tokens=60, **options)
            assert (
                len(small.generate("Hi", **options).alternatives) == 8
            )  # without a requested length, as many tokens as fit
            assert small.generate("What is the capital of France?", max_new_tokens=5).token_ids

    def test_without_paged_attention(self, demo_int4: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device that does not support it runs without it, with a warning."""
        from ov_phi3.backends import llm_pipeline

        real = llm_pipeline.LLMPipelineBackend

        def refuses(model: Path, device: str, properties: dict[str, Any], **options: Any) -> Any:
            if "scheduler_config" in properties:
                raise RuntimeError("Paged attention is not supported here")
            return real(model, device, properties, **options)

        monkeypatch.setattr(llm_pipeline, "LLMPipelineBackend", refuses)
        with pytest.warns(ModelWarning, match="did not accept paged attention.*Paged attention is not supported here"):
            pipe = ov_phi3.load(demo_int4, device=device)
        with pipe:
            chat = pipe.chat()
            chat.send("Name a fruit.", max_new_tokens=4)
            assert chat.send("Another.", max_new_tokens=4).metrics.reused_tokens == 0
            assert chat.kv.cached_tokens == 0

    def test_a_scheduler_without_prefix_caching_reuses_nothing(self, demo_int4: Path, device: str) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 100
        scheduler.enable_prefix_caching = False
        with ov_phi3.load(demo_int4, device=device, ov_config={"scheduler_config": scheduler}) as pipe:
            ids = pipe.encode("Name a fruit.").tolist()
            assert [pipe.generate(ids, max_new_tokens=4).metrics.reused_tokens for _ in range(2)] == [0, 0]

    def test_the_canary_is_in_the_prefix_index(self, demo_int4: Path, device: str, tmp_path: Path) -> None:
        with ov_phi3.load(demo_int4, device=device, ov_config={"CACHE_DIR": str(tmp_path)}) as pipe:
            index: Any = pipe.engine.check_open().prefix_index
            assert len(index._stored) == 1
