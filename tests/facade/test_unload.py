"""A model leaves memory when asked or when idle, and comes back with the next request."""

from __future__ import annotations

import gc
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ov_phi3
from ov_phi3.engine.parking import copy_to_disk
from ov_phi3.kv.entry import KVEntry

GREEDY = {"max_new_tokens": 12, "ignore_eos": True, "do_sample": False}
WAIT_S = 60.0


@pytest.fixture(params=["llm_pipeline", "infer_request"])
def own(request: pytest.FixtureRequest, tiny_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    with ov_phi3.load(tiny_fp32, device, backend=request.param) as pipe:
        yield pipe


def until(condition: Callable[[], bool]) -> None:
    """Poll until something holds that no event reports."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_next_request_loads_again_and_says_so(own: ov_phi3.Pipeline) -> None:
    before = own.generate("Name a colour. " * 20, **GREEDY)
    assert before.metrics.load_ms is None
    assert own.loaded
    own.unload()
    assert not own.loaded
    assert "unloaded" in repr(own)
    after = own.generate("Name a colour. " * 20, **GREEDY)
    assert after.token_ids == before.token_ids
    assert after.metrics.reused_tokens == 0
    load_ms, ttft_ms = after.metrics.load_ms, after.metrics.ttft_ms
    assert load_ms is not None
    assert ttft_ms is not None
    assert 0 < load_ms < ttft_ms
    assert after.metrics.queue_ms < load_ms
    assert "to load the model again" in str(after.metrics)
    assert after.metrics.to_dict()["load_ms"] == load_ms
    again = own.generate("Name a colour. " * 20, **GREEDY)
    assert again.metrics.load_ms is None
    assert again.metrics.reused_tokens


def test_a_chat_goes_on_with_the_same_ids(own: ov_phi3.Pipeline) -> None:
    def second_turn(*, unload: bool) -> list[int]:
        chat = own.chat(system="Be brief.")
        chat.send("Hello", **GREEDY)
        if unload:
            own.unload()
        return chat.send("And now?", **GREEDY).token_ids

    assert second_turn(unload=True) == second_turn(unload=False)


def test_twice_and_after_close(own: ov_phi3.Pipeline) -> None:
    own.unload()
    own.unload()
    own.close()
    assert not own.loaded
    with pytest.raises(ov_phi3.ClosedError):
        own.unload()


def test_options_are_checked_without_loading(own: ov_phi3.Pipeline) -> None:
    own.unload()
    with pytest.raises(ov_phi3.ConfigError):
        own.generate("x", max_new_tokens=-1)
    assert own.count_tokens("Hello") > 1
    assert not own.loaded


def test_a_running_reply_is_waited_for(own: ov_phi3.Pipeline) -> None:
    stream = own.stream("Hello", max_new_tokens=200, ignore_eos=True, do_sample=False)
    reading = iter(stream)  # held: to drop it would cancel the reply
    next(reading)
    own.unload()
    assert stream.done
    assert len(stream.result.token_ids) == 200
    assert not own.loaded


def test_from_inside_a_callback_it_is_refused(own: ov_phi3.Pipeline) -> None:
    with pytest.raises(ov_phi3.StreamError, match="callback"):
        own.generate("Hello", on_prefill=lambda *_: own.unload(), **GREEDY)
    assert own.generate("Hello", **GREEDY).token_ids


def test_a_held_prefix_keeps_its_keys_and_values(tiny_fp32: Path, device: str) -> None:
    with ov_phi3.load(tiny_fp32, device, backend="infer_request") as pipe:
        prefix = pipe.prefill([{"role": "system", "content": "You are a helpful assistant. " * 8}])
        before = pipe.generate("Hi", prefix=prefix, **GREEDY)
        pipe.unload()
        after = pipe.generate("Hi", prefix=prefix, **GREEDY)
        assert after.token_ids == before.token_ids
        assert after.metrics.reused_tokens == before.metrics.reused_tokens == len(prefix.token_ids)


def test_requests_that_start_at_once_load_once(tiny_fp32: Path, device: str) -> None:
    with ov_phi3.load(tiny_fp32, device, concurrency=4) as pipe:
        pipe.unload()
        streams = [pipe.stream(f"Question {n}", **GREEDY) for n in range(4)]
        loads = [stream.result.metrics.load_ms for stream in streams]
        assert sum(load is not None for load in loads) == 1


def test_what_cannot_be_loaded_again_fails_and_can_be_retried(tiny_fp32: Path, device: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_fp32, tmp_path / "model"))
    graph, away = copy / "openvino_model.xml", tmp_path / "away.xml"
    with ov_phi3.load(copy, device, backend="infer_request") as pipe:
        pipe.unload()
        graph.rename(away)
        with pytest.raises(ov_phi3.ModelError):
            pipe.generate("Hello", **GREEDY)
        assert not pipe.loaded
        away.rename(graph)
        assert pipe.generate("Hello", **GREEDY).metrics.load_ms


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
class TestIdle:
    """`load(idle_unload=)`."""

    def test_unloads_when_nothing_runs(self, tiny_fp32: Path, device: str, backend: str) -> None:
        with ov_phi3.load(tiny_fp32, device, backend=backend, idle_unload=0.05) as pipe:
            until(lambda: not pipe.loaded)  # also before the first request
            stream = pipe.stream("Hello", max_new_tokens=300, ignore_eos=True)
            for chunk in stream:
                assert pipe.loaded or chunk.finish_reason
            until(lambda: not pipe.loaded)
            assert pipe.generate("Hello", **GREEDY).metrics.load_ms

    def test_its_thread_ends(self, tiny_fp32: Path, device: str, backend: str) -> None:
        def watches() -> int:
            return sum(thread.name == "ov_phi3-idle" for thread in threading.enumerate())

        before = watches()
        pipe = ov_phi3.load(tiny_fp32, device, backend=backend, idle_unload=3600)
        assert watches() == before + 1
        pipe.generate("Hello", **GREEDY)
        pipe.close()
        until(lambda: watches() == before)


def test_the_watch_keeps_no_pipeline(tiny_fp32: Path, device: str) -> None:
    import weakref

    pipe = ov_phi3.load(tiny_fp32, device, idle_unload=3600)
    engine = weakref.ref(pipe.engine)
    del pipe
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("value", [0, -1, float("nan"), "5", True])
def test_wrong_durations(tiny_fp32: Path, value: object) -> None:
    with pytest.raises((ov_phi3.ConfigError, TypeError), match="idle_unload"):
        ov_phi3.load(tiny_fp32, idle_unload=value)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_memory_is_given_back(demo_int4: Path, device: str, backend: str) -> None:
    def resident_mib() -> float:
        gc.collect()
        (kib,) = re.findall(r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
        return int(kib) / 1024

    with ov_phi3.load(demo_int4, device, backend=backend) as pipe:
        pipe.generate("Hello", **GREEDY)
        loaded = resident_mib()
        pipe.unload()
        assert loaded - resident_mib() > 100  # the weights alone have 105 MB


class TestUnloadDir:
    """Keys and values of open chats are on disk while the model is unloaded."""

    @pytest.fixture
    def parked(self, tiny_fp32: Path, device: str, tmp_path: Path) -> Iterator[ov_phi3.Pipeline]:
        with ov_phi3.load(tiny_fp32, device, unload_dir=tmp_path) as pipe:
            yield pipe

    def test_chats_prefill_their_new_tokens_only(self, parked: ov_phi3.Pipeline, tmp_path: Path) -> None:
        chats = [parked.chat(system=f"You are number {number}. " * 20) for number in range(3)]
        for chat in chats:
            chat.send("Hello", **GREEDY)
        expected = [chat.fork().send("And now?", **GREEDY) for chat in chats]
        gone = chats.pop()
        del gone
        gc.collect()
        for _ in range(2):  # the second time the entries are held already
            parked.unload()
            assert parked.generate("Hi", **GREEDY).metrics.load_ms is not None
        results = [chat.send("And now?", **GREEDY) for chat in chats]
        for result, right in zip(results, expected, strict=False):
            assert result.token_ids == right.token_ids
            assert result.metrics.reused_tokens == right.metrics.reused_tokens
        again = [chat.send("And then?", **GREEDY).metrics.reused_tokens for chat in chats]
        assert all(again)

    def test_they_are_in_files_and_not_in_memory(self, parked: ov_phi3.Pipeline, tmp_path: Path) -> None:
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("needs Linux's list of mapped files")
        chat = parked.chat()
        chat.send("Hello", **GREEDY)
        parked.unload()
        assert str(tmp_path) in maps.read_text(encoding="utf-8")
        chat.send("And now?", **GREEDY)
        gc.collect()
        assert str(tmp_path) not in maps.read_text(encoding="utf-8")

    def test_an_idle_model_too(self, tiny_fp32: Path, device: str, tmp_path: Path) -> None:
        with ov_phi3.load(tiny_fp32, device, idle_unload=0.2, unload_dir=tmp_path) as pipe:
            chat = pipe.chat()
            chat.send("Hello", **GREEDY)
            tokens = len(chat.token_ids)
            until(lambda: not pipe.loaded)
            metrics = chat.send("And now?", **GREEDY).metrics
            assert metrics.load_ms is not None
            assert (metrics.reused_tokens or 0) >= tokens - 1

    @pytest.mark.parametrize("over", [-40, 1, 30])
    def test_a_longrope_model(self, longrope: tuple[Path, Path, int], device: str, tmp_path: Path, over: int) -> None:
        path, _, boundary = longrope
        with ov_phi3.load(path, device, unload_dir=tmp_path) as pipe:
            chat = pipe.chat()
            room = boundary + over - len(pipe.encode("Hello"))
            chat.send("Hello", max_new_tokens=room, ignore_eos=True, do_sample=False)
            assert len(chat.token_ids) == boundary + over
            expected = chat.fork().send("And now?", **GREEDY)
            pipe.unload()
            held = chat._held_kv
            assert held is None or held.long_rope == (over > 0)  # keys with the other factors would be of no use
            result = chat.send("And now?", **GREEDY)
        assert result.token_ids == expected.token_ids
        assert result.metrics.reused_tokens in (0, expected.metrics.reused_tokens)

    def test_chats_that_are_opened_meanwhile(self, parked: ov_phi3.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []

        def copy(entry: KVEntry, directory: Path) -> KVEntry:
            thread = threading.Thread(target=lambda: opened.append(parked.chat(system="Be brief.")))
            thread.start()
            thread.join()
            return copy_to_disk(entry, directory)

        monkeypatch.setattr("ov_phi3.engine.parking.copy_to_disk", copy)
        chats = [parked.chat() for _ in range(3)]
        for chat in chats:
            chat.send("Hello", **GREEDY)
        parked.unload()
        assert len(opened) == 3
        for chat in [*chats, *opened]:
            assert chat.send("And now?", **GREEDY).finish_reason == "length"

    @pytest.mark.parametrize("error", [MemoryError(), ValueError("no")])
    def test_the_model_leaves_memory_in_any_case(
        self, parked: ov_phi3.Pipeline, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(entry: KVEntry, directory: Path) -> KVEntry:
            raise error

        monkeypatch.setattr("ov_phi3.engine.parking.copy_to_disk", fail)
        chat = parked.chat()
        chat.send("Hello", **GREEDY)
        parked.unload()
        assert not parked.loaded
        assert chat.send("And now?", **GREEDY).metrics.reused_tokens == 0

    def test_close_waits_for_no_more_than_one_copy(
        self, parked: ov_phi3.Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copies = []
        writing, closing = threading.Event(), threading.Event()

        def copy(entry: KVEntry, directory: Path) -> KVEntry:
            copies.append(entry)
            writing.set()
            assert closing.wait(WAIT_S)
            return copy_to_disk(entry, directory)

        monkeypatch.setattr("ov_phi3.engine.parking.copy_to_disk", copy)
        chats = [parked.chat() for _ in range(3)]
        for chat in chats:
            chat.send("Hello", **GREEDY)
        unloading = threading.Thread(target=parked.unload)
        unloading.start()
        assert writing.wait(WAIT_S)
        closer = threading.Thread(target=parked.close)
        closer.start()
        until(lambda: parked.engine.closed)
        closing.set()
        for thread in (unloading, closer):
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert len(copies) == 1

    def test_a_chat_that_changed_meanwhile(self, parked: ov_phi3.Pipeline) -> None:
        chat = parked.chat()
        chat.send("Hello", **GREEDY)
        first = len(chat.token_ids)
        chat.send("And now?", **GREEDY)
        parked.unload()
        chat.rewind()
        result = chat.send("Or else?", **GREEDY)
        assert first - 1 <= (result.metrics.reused_tokens or 0) < len(result.prompt_token_ids)
        assert result.token_ids == parked.generate(result.prompt_token_ids, seed=1, **GREEDY).token_ids

    def test_a_folder_that_is_gone(
        self, parked: ov_phi3.Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        chat = parked.chat()
        chat.send("Hello", **GREEDY)
        tmp_path.rmdir()
        parked.unload()
        assert not parked.loaded
        assert f"could not be written to {tmp_path}" in caplog.text
        assert chat.send("And now?", **GREEDY).metrics.reused_tokens == 0

    def test_what_load_refuses(self, tiny_fp32: Path, device: str, tmp_path: Path) -> None:
        with pytest.raises(ov_phi3.ConfigError, match="does not work with backend='llm_pipeline', whose cache cannot"):
            ov_phi3.load(tiny_fp32, device, backend="llm_pipeline", unload_dir=tmp_path)
        with pytest.raises(ov_phi3.ConfigError, match="is not a directory; make it first"):
            ov_phi3.load(tiny_fp32, device, unload_dir=tmp_path / "none")
