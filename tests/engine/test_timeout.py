"""`timeout=`: a request ends cleanly when its time is up, wherever it is."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from scripted import WORD, Clock, MakePipe

import ov_phi3
from ov_phi3 import ConfigError, Pipeline
from ov_phi3.engine import worker


class TestScripted:
    def test_between_tokens(self, make: MakePipe, clock: Clock) -> None:
        pipe, _ = make([[WORD]] * 9, before_step=lambda index: setattr(clock, "now", 1000.0 + index))
        result = pipe.generate("x", timeout=3.5)
        assert result.finish_reason == "timeout"
        assert result.token_ids == [WORD] * 4
        assert pipe.generate("x", timeout=100, max_new_tokens=9).token_ids == [WORD] * 9

    def test_while_waiting_for_a_turn(self, make: MakePipe) -> None:
        gate = threading.Semaphore(0)
        pipe, backend = make([[WORD]], gate=gate)
        first = pipe.stream("x")
        second = pipe.stream("x", timeout=0.01)
        assert second.result.finish_reason == "timeout"  # while the first still runs
        assert second.result.token_ids == []
        third = pipe.stream("x")
        gate.release(2)
        assert first.result.token_ids == third.result.token_ids == [WORD]
        assert len(backend.requests) == 2

    def test_a_deadline_missed_by_a_hair(self, make: MakePipe, clock: Clock) -> None:
        """The wait ends by the system's clock, while the time stamps still say that there is time left."""
        gate = threading.Semaphore(0)
        pipe, backend = make([[WORD]], gate=gate)
        first = pipe.stream("x")
        second = pipe.stream("x", timeout=0.01)
        assert second.result.finish_reason == "timeout"
        assert clock.now == 1000.0
        gate.release()
        assert first.result.token_ids == [WORD]
        assert len(backend.requests) == 1

    def test_a_reply_that_ended_in_time(self, make: MakePipe, clock: Clock) -> None:
        pipe, _ = make([[WORD]] * 2)
        assert pipe.generate("x", timeout=5, max_new_tokens=2).finish_reason == "length"

    def test_cancelled_comes_first(self, make: MakePipe, clock: Clock) -> None:
        streams: list[Any] = []
        ready = threading.Event()

        def step(index: int) -> None:
            ready.wait()
            if index == 2:
                streams[0].cancel()
                clock.now += 100

        pipe, _ = make([[WORD]] * 9, before_step=step)
        streams.append(pipe.stream("x", timeout=50))
        ready.set()
        assert streams[0].result.finish_reason == "cancelled"

    @pytest.mark.parametrize(
        ("value", "error"),
        [(0, ConfigError), (-1, ConfigError), (float("nan"), ConfigError), ("1", TypeError), (True, TypeError)],
    )
    def test_wrong_values(self, make: MakePipe, value: Any, error: type[Exception]) -> None:
        pipe, _ = make([[WORD]])
        with pytest.raises(error, match="timeout"):
            pipe.generate("x", timeout=value)
        assert pipe.generate("x", timeout=float("inf")).token_ids == [WORD]


@pytest.mark.parametrize("pipes", ["pipe", "loop"])
class TestOnTheEngine:
    def test_a_long_reply(self, pipes: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe: Pipeline = request.getfixturevalue(pipes)
        real, late_s = worker.now, [0.0]
        monkeypatch.setattr(worker, "now", lambda: real() + late_s[0])
        stream = pipe.stream("Tell me about the sea.", ignore_eos=True, timeout=1000)
        next(chunks := iter(stream))
        late_s[0] = 2000.0
        assert stream.result.finish_reason == "timeout"
        assert 0 < len(stream.result.token_ids) < 1000
        del chunks
        late_s[0] = 0.0
        assert "Paris" in pipe.generate("What is the capital of France?", timeout=60).text

    def test_a_chat_keeps_what_came(
        self, pipes: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe: Pipeline = request.getfixturevalue(pipes)
        real, late_s = worker.now, [0.0]
        monkeypatch.setattr(worker, "now", lambda: real() + late_s[0])
        for on_cancel, messages in (("keep", 2), ("drop", 0)):
            chat = pipe.chat(on_cancel=on_cancel)
            late_s[0] = 0.0
            stream = chat.stream("Tell me about the sea.", ignore_eos=True, timeout=1000)
            for count, _ in enumerate(stream):
                late_s[0] = 2000.0 if count == 3 else late_s[0]
            assert stream.result.finish_reason == "timeout"
            assert stream.result.token_ids
            assert len(chat.messages) == messages
            late_s[0] = 0.0
            assert chat.send("What is the capital of France?", max_new_tokens=5).finish_reason in ("stop", "length")


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_during_a_long_prefill(demo_fp32: Any, device: str, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    with ov_phi3.load(demo_fp32, device=device, backend=backend, prefill_chunk=64) as pipe:
        ids = np.random.default_rng(0).integers(100, 40_000, 640)
        late = [False]
        real = worker.now
        monkeypatch.setattr(worker, "now", lambda: real() + 1000.0 * late[0])

        def on_prefill(done: int, total: int) -> None:
            late[0] = done >= 192

        result = pipe.generate(ids, timeout=100, on_prefill=on_prefill)
        assert (result.finish_reason, result.token_ids) == ("timeout", [])
        monkeypatch.undo()
        assert pipe.generate(ids, max_new_tokens=1).metrics.reused_tokens == 192
