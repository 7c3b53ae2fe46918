"""The books of the prefix cache, what a token costs in it, and how large it is made."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ov_phi3
from ov_phi3 import ConfigError, ContextOverflowError, DeviceInfo, ModelInfo, ModelWarning, Pipeline
from ov_phi3.kv.cache import BlockLedger, KVLayout
from ov_phi3.kv.sizing import plan
from ov_phi3.system.machine import Memory

CPU = DeviceInfo("CPU", "a CPU", "CPU")
GPU = DeviceInfo("GPU.0", "a GPU", "GPU")
NPU = DeviceInfo("NPU", "an NPU", "NPU")
GIB = 2**30


def ids(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def counted(start: int, count: int) -> Any:
    return np.arange(start, start + count, dtype=np.int64)


def note(ledger: BlockLedger, prompt: Any, generated: Any = (), **options: Any) -> None:
    ledger.record(prompt, list(generated), **{"longest": len(generated), "exact": True, **options})


class TestLedger:
    def test_nothing_at_first(self) -> None:
        assert BlockLedger(4, 10).find(counted(0, 9)) == 0

    def test_full_blocks_and_the_rest_of_the_last_one(self) -> None:
        ledger = BlockLedger(4, 10)
        note(ledger, counted(0, 10))  # blocks of 4, 4 and 2
        assert ledger.find(counted(0, 30)) == 10
        assert ledger.find(np.append(counted(0, 9), 99)) == 8  # the rest differs
        assert ledger.find(np.append(counted(0, 7), 99)) == 4
        assert ledger.find(ids(99, *range(1, 10))) == 0

    def test_the_last_token_is_computed_in_any_case(self) -> None:
        ledger = BlockLedger(4, 10)
        note(ledger, counted(0, 8))
        assert ledger.find(counted(0, 8)) == 7
        assert ledger.find(counted(0, 5)) == 4

    def test_generated_ids_count(self) -> None:
        ledger = BlockLedger(4, 10)
        note(ledger, counted(0, 6), counted(6, 5))
        assert ledger.find(counted(0, 20)) == 11

    def test_a_rest_that_grew_is_no_longer_found(self) -> None:
        ledger = BlockLedger(4, 10)
        note(ledger, counted(0, 6))
        note(ledger, counted(0, 7))
        assert ledger.find(ids(*range(6), 50, 51)) == 4
        assert ledger.find(counted(0, 9)) == 7

    def test_an_inexact_end_counts_full_blocks_only(self) -> None:
        ledger = BlockLedger(4, 10)
        note(ledger, counted(0, 6), counted(6, 5), exact=False)
        assert ledger.find(counted(0, 20)) == 8

    def test_salt_keeps_apart(self) -> None:
        ledger = BlockLedger(4, 10)
        note(ledger, counted(0, 8))
        assert ledger.find(counted(0, 12), b"other") == 0
        note(ledger, counted(0, 12), salt=b"other")
        assert ledger.find(counted(0, 12), b"other") == 11

    def test_the_least_recently_used_goes_first(self) -> None:
        ledger = BlockLedger(4, 4)
        note(ledger, counted(0, 8))
        note(ledger, counted(100, 8))
        note(ledger, counted(0, 8))  # used again
        note(ledger, counted(200, 8))
        assert ledger.find(counted(0, 9)) == 8
        assert ledger.find(counted(100, 9)) == 0
        assert ledger.find(counted(200, 9)) == 8

    def test_free_places_go_before_cached_blocks(self) -> None:
        ledger = BlockLedger(4, 6)
        for start in (0, 100, 200):
            note(ledger, counted(start, 8))
        assert [ledger.find(counted(start, 9)) for start in (0, 100, 200)] == [8, 8, 8]

    def test_other_sequences_take_places(self) -> None:
        ledger = BlockLedger(4, 4)
        note(ledger, counted(0, 8))
        note(ledger, counted(100, 4), others=3)
        assert ledger.find(counted(0, 9)) == 0

    def test_one_that_grows_makes_room_for_twice_the_prompt(self) -> None:
        ledger = BlockLedger(4)
        note(ledger, counted(0, 8), longest=8)  # 4 places
        note(ledger, counted(100, 8), longest=8)
        assert ledger.find(counted(0, 9)) == 8
        note(ledger, counted(200, 8), longest=8)
        assert ledger.find(counted(0, 9)) == 0
        assert ledger.capacity == 16
        note(ledger, counted(300, 8), counted(308, 300))
        assert ledger.find(counted(300, 400)) == 308

    def test_after_a_failure_nothing_is_known(self) -> None:
        ledger = BlockLedger(4, 6)
        note(ledger, counted(0, 8))
        ledger.forget()
        assert ledger.find(counted(0, 9)) == 0
        for start in (100, 200, 300):
            note(ledger, counted(start, 8))
        assert [ledger.find(counted(start, 9)) for start in (100, 200, 300)] == [8, 8, 8]

    @given(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(0, 8), st.booleans()), min_size=1, max_size=30
        ),
        st.sampled_from([0, 8, 12]),
    )
    def test_what_is_found_was_there(self, requests: list[tuple[int, int, int, bool]], places: int) -> None:
        """Never more than a beginning that some request had, never the whole prompt; and places are never lost."""
        ledger, asked = BlockLedger(4, places), []
        for base, prompt, reply, exact in requests:
            whole = counted(base * 1000, prompt + reply)
            found = ledger.find(whole[:prompt])
            assert found < prompt
            assert found <= max((len(a) for a in asked if a[0] == whole[0]), default=0)
            note(ledger, whole[:prompt], whole[prompt:], exact=exact)
            asked.append(whole)
            assert len(ledger._free) + len(ledger._stored) == ledger._places
            assert places == 0 or ledger._places == places


def info_of(pipe: Pipeline, **changes: Any) -> ModelInfo:
    return replace(pipe.info, **changes)


class TestBytes:
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

    def test_the_export_and_the_device_decide(self, pipe: Pipeline) -> None:
        exported = info_of(pipe, runtime_options={"KV_CACHE_PRECISION": "f16"})
        assert KVLayout.of(exported, "CPU", {}).key == "f16"
        assert KVLayout.of(exported, "CPU", {"KV_CACHE_PRECISION": "u8"}).key == "u8"
        assert KVLayout.of(info_of(pipe, runtime_options={}), "GPU", {}).key == "f16"

    def test_float16_is_the_models_own_figure(self, pipe: Pipeline) -> None:
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
    def test_is_what_the_engine_asks_for(
        self, name: str, properties: dict[str, str], demo_int4: Path, tiny_fp32: Path, device: str
    ) -> None:
        """The address space that twice as large a cache takes more, in processes of their own."""
        if device != "CPU":
            pytest.skip("memory of the process is asked for on the CPU only")
        path = {"demo-int4": demo_int4, "tiny-fp32": tiny_fp32}[name]
        info = ModelInfo.from_dir(path)
        given = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if name == "tiny-fp32" else {}
        size = KVLayout.of(info, "CPU", {**given, **properties}).block_bytes(info)
        blocks = 5 * GIB // 2 // size  # so much that every layer's part is mapped by itself
        taken = [_taken(path, count, properties) for count in (blocks, 2 * blocks)]
        assert taken[1] - taken[0] == pytest.approx(
            blocks * size, rel=0.05
        )  # a thread's heap is 64 MiB of address space, too


_CHILD = """
import json, sys
import ov_phi3
from ov_phi3.kv.sizing import KVPool

path, blocks, properties = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
from ov_phi3 import loading
real = loading.plan

def plan(*args, **options):
    pool = real(*args, **options)
    return KVPool(pool.layout, blocks, pool.window, True)

loading.plan = plan

def size():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))

with ov_phi3.load(path, device="CPU", ov_config=properties) as pipe:
    before = size()
    pipe.generate([5] * 40, max_new_tokens=2, ignore_eos=True)
    print(size() - before)
"""


def _taken(path: Path, blocks: int, properties: dict[str, str]) -> int:
    command = [sys.executable, "-c", _CHILD, str(path), str(blocks), json.dumps(properties)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


class TestPool:
    def test_one_conversation_on_the_cpu(self, pipe: Pipeline) -> None:
        pool = plan(pipe.info, CPU, {}, memory=Memory(64 * GIB, 64 * GIB))
        assert (pool.window, pool.num_blocks) == (8192, 257)
        assert pool.properties({})["scheduler_config"].num_kv_blocks == 257
        assert plan(pipe.info, CPU, {}, context_length=100, memory=Memory(GIB, GIB)).num_blocks == 5

    def test_grows_on_a_gpu(self, pipe: Pipeline) -> None:
        pool = plan(pipe.info, GPU, {})
        assert (pool.window, pool.num_blocks, pool.scheduler) == (8192, 0, True)
        limited = plan(pipe.info, GPU, {}, kv_cache_gb=0.1)
        assert limited.num_blocks == int(0.1 * GIB / (pipe.info.kv_bytes_per_token * 16))
        assert limited.window == (limited.num_blocks - 1) * 16

    @pytest.mark.parametrize(("place", "properties"), [(NPU, {}), (CPU, {"ATTENTION_BACKEND": "SDPA"})])
    def test_no_scheduler_without_paged_attention(
        self, pipe: Pipeline, place: DeviceInfo, properties: dict[str, str]
    ) -> None:
        pool = plan(pipe.info, place, properties)
        assert (pool.window, pool.scheduler) == (8192, False)
        assert "scheduler_config" not in pool.properties(properties)
        assert plan(pipe.info, place, properties, kv_cache_gb=0.01).window < 1000

    def test_little_memory_shortens_the_window(self, pipe: Pipeline) -> None:
        pool = plan(pipe.info, CPU, {}, memory=Memory(GIB, GIB // 4))
        assert pool.window < 8192
        assert pool.num_blocks * pool.layout.block_bytes(pipe.info) < GIB // 8
        assert "memory" in pool.because
        assert "8192" in pool.doubts[0]

    def test_a_window_that_memory_cannot_hold(self, pipe: Pipeline) -> None:
        with pytest.raises(ConfigError, match=r"context_length=8192 needs 0\.1 GiB .*at most \d+ tokens"):
            plan(pipe.info, CPU, {}, context_length=8192, memory=Memory(GIB, GIB // 5))

    def test_the_callers_own_scheduler(self, pipe: Pipeline) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 11
        pool = plan(pipe.info, CPU, {"scheduler_config": scheduler})
        assert (pool.window, pool.scheduler) == (320, False)
        with pytest.raises(ConfigError, match="give one of them"):
            plan(pipe.info, CPU, {"scheduler_config": scheduler}, kv_cache_gb=1)


class TestOnTheEngine:
    def test_a_budget_is_a_window(self, demo_int4: Path, device: str) -> None:
        gib = 0.005
        with ov_phi3.load(demo_int4, device=device, kv_cache_gb=gib) as small:
            window = small.context_length
            assert (window + 32) * small._pool.layout.bytes_per_token(small.info) <= gib * GIB
            with pytest.raises(
                ContextOverflowError, match=rf"window of {window} tokens \(what kv_cache_gb=0.005 holds"
            ):
                small.generate("x " * window)
            for start in (5, 6, 7):  # each fills the cache anew
                result = small.generate([start] * (window - 40), ignore_eos=True)
                assert len(result.token_ids) == 40
            assert small.generate("What is the capital of France?", max_new_tokens=5).token_ids

    def test_a_failure_that_is_ours_to_explain(self, demo_int4: Path, device: str) -> None:
        with ov_phi3.load(demo_int4, device=device, kv_cache_gb=0.003) as small:
            options: dict[str, Any] = {"num_return_sequences": 8, "temperature": 1.0, "ignore_eos": True}
            with pytest.raises(ContextOverflowError, match="8 replies of up to 60 tokens"):
                small.generate("Hi", max_new_tokens=60, **options)
            assert len(small.generate("Hi", **options).alternatives) == 8  # without a limit, what surely fits
            assert small.generate("What is the capital of France?", max_new_tokens=5).token_ids

    def test_without_paged_attention(self, demo_int4: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device that does not take it runs without, and says so."""
        from ov_phi3 import opening as engines

        real = engines.LLMPipelineBackend

        def refuses(model: Path, device: str, properties: dict[str, Any], **options: Any) -> Any:
            if "scheduler_config" in properties:
                raise RuntimeError("Paged attention is not supported here")
            return real(model, device, properties, **options)

        monkeypatch.setattr(engines, "LLMPipelineBackend", refuses)
        with pytest.warns(ModelWarning, match="did not take paged attention.*Paged attention is not supported here"):
            pipe = ov_phi3.load(demo_int4, device=device)
        with pipe:
            chat = pipe.chat()
            chat.send("Name a fruit.", max_new_tokens=4)
            assert chat.send("Another.", max_new_tokens=4).metrics.reused_tokens == 0
            assert chat.kv.cached_tokens == 0

    def test_the_callers_scheduler_with_eviction_is_not_reckoned(self, demo_int4: Path, device: str) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 100
        scheduler.enable_prefix_caching = False
        with ov_phi3.load(demo_int4, device=device, ov_config={"scheduler_config": scheduler}) as pipe:
            ids = pipe.encode("Name a fruit.").tolist()
            assert [pipe.generate(ids, max_new_tokens=4).metrics.reused_tokens for _ in range(2)] == [0, 0]

    def test_the_canary_is_in_the_books(self, demo_int4: Path, device: str, tmp_path: Path) -> None:
        with ov_phi3.load(demo_int4, device=device, ov_config={"CACHE_DIR": str(tmp_path)}) as pipe:
            assert pipe._generator.ledger is not None
            assert len(pipe._generator.ledger._stored) == 1


@pytest.fixture(scope="module")
def pieces(demo_fp32: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(demo_fp32, device=device, prefill_chunk=64) as pipe:
        yield pipe


class TestPrefill:
    def test_progress(self, pieces: Pipeline) -> None:
        prompt = np.random.default_rng(0).integers(300, 30_000, 300).tolist()
        seen: list[tuple[int, int]] = []
        first = pieces.generate(prompt, max_new_tokens=3, on_prefill=lambda done, total: seen.append((done, total)))
        assert seen == [(0, 300), (64, 300), (128, 300), (192, 300), (256, 300), (300, 300)]
        seen.clear()
        again = pieces.generate(
            [*prompt, 5], max_new_tokens=3, on_prefill=lambda done, total: seen.append((done, total))
        )
        assert seen == [(288, 301), (301, 301)]
        assert (first.metrics.reused_tokens, again.metrics.reused_tokens) == (0, 288)  # full blocks: the rest went on

    def test_pieces_give_the_same_ids(self, pieces: Pipeline, demo_fp32: Path, device: str) -> None:
        prompt = pieces.encode("Tell me about the sea, " + "and about the sky, " * 60)
        with ov_phi3.load(demo_fp32, device=device, prefill_chunk=0) as whole:
            seen: list[int] = []
            expected = whole.generate(prompt, max_new_tokens=30, on_prefill=lambda done, _: seen.append(done))
            assert seen == [0, len(prompt)]
        assert pieces.generate(prompt, max_new_tokens=30).token_ids == expected.token_ids

    def test_cancelled_between_pieces(self, pieces: Pipeline) -> None:
        prompt = np.random.default_rng(1).integers(300, 30_000, 1000).tolist()
        seen: list[int] = []

        def watch(done: int, _total: int) -> None:
            seen.append(done)
            if done == 128:
                stream[0].cancel()

        started = threading.Event()
        stream: list[Any] = []

        def first(done: int, total: int) -> None:
            started.wait(30)
            watch(done, total)

        stream.append(pieces.stream(prompt, on_prefill=first))
        started.set()
        result = stream[0].result
        assert (result.finish_reason, result.token_ids, result.text) == ("cancelled", [], "")
        assert seen[-1] == 128
        # What was prefilled is not lost.
        assert pieces.generate(prompt, max_new_tokens=2).metrics.reused_tokens == 128

    def test_a_callback_that_raises(self, pieces: Pipeline) -> None:
        prompt = np.random.default_rng(2).integers(300, 30_000, 200).tolist()
        for at in (0, 64, 200):

            def raises(done: int, _total: int, at: int = at) -> None:
                if done >= at:
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                pieces.generate(prompt, max_new_tokens=2, on_prefill=raises)
        assert pieces.generate("What is the capital of France?").text == "The capital of France is Paris."

    @pytest.mark.parametrize(
        ("chunk", "error"), [(-1, ConfigError), (True, TypeError), ("64", TypeError), (1.5, TypeError)]
    )
    def test_wrong_pieces(self, demo_int4: Path, device: str, chunk: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="prefill_chunk"):
            ov_phi3.load(demo_int4, device=device, prefill_chunk=chunk)

    def test_a_callback_that_is_none(self, pipe: Pipeline) -> None:
        with pytest.raises(TypeError, match="on_prefill"):
            pipe.generate("Hi", on_prefill="bar")  # type: ignore[arg-type]
