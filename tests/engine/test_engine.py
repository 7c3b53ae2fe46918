"""The engine on a scripted backend: errors, order of the requests, Ctrl-C, and closing."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
from scripted import WORD, Clock, MakePipe, ScriptedBackend, forever, steps_of

from ov_phi3 import (
    ClosedError,
    ConfigError,
    ContextOverflowError,
    GenerationConfig,
    GenerationError,
    PromptError,
    Tokenizer,
)
from ov_phi3.backends.request_queue import RequestQueue
from ov_phi3.engine.channel import Channel
from ov_phi3.engine.engine import Submission
from ov_phi3.engine.worker import ReplyOptions, now


class TestErrors:
    """Raised in the consumer, as `ov_phi3.Error`; the pipeline stays usable."""

    def test_of_the_engine(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, backend = make(
            steps_of(tokenizer, "a b"), failure=RuntimeError("Exception from src/x.cpp:1:\nout of luck")
        )
        stream = pipe.stream("x", max_new_tokens=50)
        seen = []
        with pytest.raises(GenerationError, match=r"failed: out of luck\. The pipeline can still be used") as caught:
            seen += [c.text for c in stream]
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(GenerationError):
            _ = stream.result
        backend.failure = None
        assert pipe.generate("x", max_new_tokens=50).text == "a b"

    async def test_of_the_engine_async(self, make: MakePipe) -> None:
        pipe, _ = make([], failure=RuntimeError("out of luck"))
        with pytest.raises(GenerationError, match="out of luck"):
            async for _ in pipe.stream("x"):
                pass

    def test_inside_the_callback(self, make: MakePipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, _ = make(steps_of(tokenizer, "a b"))
        with monkeypatch.context() as patch:
            patch.setattr("ov_phi3.text.stream_decoder.StreamDecoder.add", lambda *_: 1 / 0)
            with pytest.raises(GenerationError, match="division"):
                list(pipe.stream("x", max_new_tokens=50))
        assert pipe.generate("x", max_new_tokens=50).text == "a b"

    @pytest.mark.parametrize(
        ("prompt", "options", "error"),
        [
            ("x", {"foo": 1}, ConfigError),
            ("x", {"max_new_tokens": 1000}, ContextOverflowError),
            ("x", {"num_beams": 2}, ConfigError),
            ("x", {"stop_token_ids": [10**6]}, ConfigError),
            ([], {}, PromptError),
            ([10**6], {}, PromptError),
            (list(range(200)), {}, ContextOverflowError),
            ({"role": "user"}, {}, TypeError),
            (3, {}, TypeError),
            (None, {}, TypeError),
            ("\ud800", {}, PromptError),
        ],
    )
    def test_before_any_work(
        self, make: MakePipe, prompt: Any, options: dict[str, Any], error: type[Exception]
    ) -> None:
        pipe, backend = make([])
        with pytest.raises(error):
            pipe.stream(prompt, **options)
        assert not backend.requests

    def test_overflow_tells_its_numbers(self, make: MakePipe) -> None:
        pipe, _ = make([])
        with pytest.raises(ContextOverflowError) as caught:
            pipe.generate([WORD] * 150, max_new_tokens=60)
        error = caught.value
        assert (error.prompt_tokens, error.max_new_tokens, error.context_length) == (150, 60, 200)
        assert "at most 50 new tokens" in str(error)

    def test_length_is_bounded_by_the_window(self, make: MakePipe) -> None:
        pipe, backend = make(forever([WORD]))
        result = pipe.generate([WORD] * 150)
        assert (len(result.token_ids), result.finish_reason) == (50, "length")
        assert backend.requests[0].config.max_new_tokens == 50


class TestQueueing:
    """One at a time, in order of arrival."""

    def test_order_of_arrival(self, make: MakePipe) -> None:
        gate = threading.Semaphore(0)
        pipe, backend = make([[WORD]], gate=gate)
        streams = [pipe.stream([7] * n) for n in range(1, 9)]
        gate.release(8)
        for stream in streams:
            assert stream.result.token_ids == [WORD]
        assert [len(r.ids) for r in backend.requests] == list(range(1, 9))
        assert backend.most_running == 1

    def test_cancelled_while_waiting(self, make: MakePipe) -> None:
        gate = threading.Semaphore(0)
        pipe, backend = make([[WORD]], gate=gate)
        first, second, third = (pipe.stream("x") for _ in range(3))
        second.cancel()
        assert second.result.finish_reason == "cancelled"  # at once, though the first still runs
        gate.release(2)
        assert first.result.token_ids == third.result.token_ids == [WORD]
        assert len(backend.requests) == 2

    def test_waiting_is_part_of_the_time_to_first_token(self, make: MakePipe) -> None:
        pipe, _ = make([[WORD]])
        metrics = pipe.generate("x").metrics
        assert metrics.ttft_ms is not None
        assert 0 <= metrics.queue_ms <= metrics.ttft_ms <= metrics.total_ms


class TestQueueTime:
    """`queue_ms` is the wait for other requests, and nothing else."""

    def test_encoding_is_not_waiting(self, make: MakePipe, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, _ = make([[WORD]])
        real = Tokenizer.encode_segments

        def slow(tokenizer: Tokenizer, segments: Any) -> Any:
            clock.now += 7.0
            return real(tokenizer, segments)

        monkeypatch.setattr(Tokenizer, "encode_segments", slow)
        for reply in (pipe.generate("x", max_new_tokens=1), pipe.chat().send("x", max_new_tokens=1)):
            assert reply.metrics.queue_ms == 0.0
            assert (reply.metrics.ttft_ms or 0.0) >= 7000.0

    def test_waiting_is_counted(self, make: MakePipe, clock: Clock) -> None:
        gate = threading.Semaphore(0)
        pipe, _ = make([[WORD]], gate=gate)
        first, second = pipe.stream("x", max_new_tokens=1), pipe.stream("x", max_new_tokens=1)
        clock.now += 3.0
        gate.release()
        assert first.result.token_ids == [WORD]
        gate.release()
        assert second.result.metrics.queue_ms == 3000.0


def test_generate_wakes_its_caller_once(make: MakePipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 tokens arrive after the caller has begun to wait; it waits once, for the end."""
    gate = threading.Semaphore(0)
    pipe, _ = make([[WORD]] * 50, gate=gate)
    waits: list[bool] = []
    wakes: list[int] = []
    real = Channel.listen

    def listen(channel: Channel, action: Callable[[], None], *, for_end: bool = False) -> bool:
        def counted() -> None:
            wakes.append(1)
            action()

        waits.append(for_end)
        waiting = real(channel, counted, for_end=for_end)
        gate.release(50)
        return waiting

    monkeypatch.setattr(Channel, "listen", listen)
    assert len(pipe.generate("x", max_new_tokens=50).token_ids) == 50
    assert (waits, wakes) == ([True, True], [1])  # the second wait finds that the reply has ended


class TestCtrlC:
    """It can raise between any two instructions; the request leaves the queue in every case."""

    def test_while_the_request_joins_the_queue(self, make: MakePipe, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, _ = make([[WORD]])

        def interrupted(ticket: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ov_phi3.backends.request_queue.Ticket.release", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pipe.generate("x")
        assert pipe.generate("x").token_ids == [WORD]

    def test_while_the_thread_starts(self, make: MakePipe, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, _ = make([[WORD]])
        start = threading.Thread.start

        def interrupted(thread: threading.Thread) -> None:
            start(thread)
            raise KeyboardInterrupt

        for replacement in (interrupted, lambda _: (_ for _ in ()).throw(KeyboardInterrupt)):
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", replacement)
                with pytest.raises(KeyboardInterrupt):
                    pipe.generate("x")
            assert pipe.generate("x").token_ids == [WORD]

    def test_a_stream_dropped_inside_the_queue_does_not_lock_it(self, make: MakePipe) -> None:
        """The garbage collector can run anywhere: here while the queue's own lock is held."""
        gate = threading.Semaphore(0)
        pipe, _ = make([[WORD]], gate=gate)
        first = pipe.stream("x")
        waiting = pipe.stream("x")
        with pipe.engine._queue._lock:
            del waiting
            gc.collect()
        gate.release(2)
        assert first.result.token_ids == pipe.generate("x").token_ids == [WORD]

    def test_a_failing_on_end_still_ends_the_stream(self, make: MakePipe) -> None:
        pipe, _ = make([[WORD]])

        def broken(result: object) -> None:
            raise KeyError("full")

        threading.excepthook, kept = (lambda _: None), threading.excepthook
        try:
            options = ReplyOptions(now(), on_end=broken)
            stream = pipe.engine.submit(Submission(pipe.encode("x"), GenerationConfig(), options))
            assert stream.result.token_ids == [WORD]
        finally:
            threading.excepthook = kept


class TestClosing:
    """Running requests end, and no new one starts."""

    def test_running_streams_are_cancelled(self, make: MakePipe) -> None:
        pipe, backend = make(forever([WORD]), window=10**9)
        stream = pipe.stream("x")
        pipe.close()
        assert stream.done
        assert stream.result.finish_reason == "cancelled"
        assert backend.closed

    def test_ctrl_c_while_it_waits_for_a_reply(self, make: MakePipe, monkeypatch: pytest.MonkeyPatch) -> None:
        """The backend is still closed, once, when the reply has ended."""
        gate = threading.Semaphore(1)
        pipe, backend = make(forever([WORD]), window=10**9, gate=gate)
        calls = closings(backend, monkeypatch)
        stream = pipe.stream("x")
        next(chunks := iter(stream))
        interrupt_once(monkeypatch, threading.Thread, "join")
        with pytest.raises(KeyboardInterrupt):
            pipe.close()
        assert pipe.engine.closed
        assert calls.empty()  # the reply still runs
        gate.release(2)
        assert calls.get(timeout=60) == 0
        assert stream.result.finish_reason == "cancelled"
        pipe.close()
        assert calls.empty()
        del chunks

    def test_ctrl_c_while_it_waits_for_its_turn(self, make: MakePipe, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, backend = make([[WORD]])
        calls = closings(backend, monkeypatch)
        interrupt_once(monkeypatch, RequestQueue, "start")
        with pytest.raises(KeyboardInterrupt):
            pipe.close()
        assert calls.get(timeout=60) == 0
        pipe.close()
        assert calls.empty()

    def test_nothing_starts_afterwards(self, make: MakePipe) -> None:
        pipe, _ = make([[WORD]])
        with pipe:
            pass
        pipe.close()
        for use in (pipe.stream, pipe.generate):
            with pytest.raises(ClosedError, match="closed"):
                use("x")
        with pytest.raises(ClosedError):
            pipe.chat()
        assert "closed" in repr(pipe)


def closings(backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[int]:
    """Receives the number of running requests at every call of a backend's close()."""
    calls: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(backend, "close", lambda: calls.put(backend.running))
    return calls


def interrupt_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """The next call of a method raises KeyboardInterrupt."""
    real = getattr(owner, name)

    def interrupted(*_: object) -> None:
        monkeypatch.setattr(owner, name, real)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
