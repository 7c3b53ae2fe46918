"""Streams on a scripted engine: order, endings, cancelling, errors; nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from typing import Any

import pytest
from scripted import WORD, MakePipe, forever

from ov_phi3 import (
    ClosedError,
    ConfigError,
    ContextOverflowError,
    GenerationConfig,
    GenerationError,
    PromptError,
    StreamError,
    Tokenizer,
)
from ov_phi3.engine.engine import Submission
from ov_phi3.engine.worker import ReplyOptions, now


def ids(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    return [[i] for i in tokenizer.encode(text).tolist()]


class TestReading:
    """Chunks in order, once, adding up."""

    def test_chunks_add_up(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(ids(tokenizer, "Hello 🦙 world"))
        stream = pipe.stream("x", max_new_tokens=50)
        chunks = list(stream)
        assert "".join(c.text for c in chunks) == stream.result.text == "Hello 🦙 world"
        assert [i for c in chunks for i in c.token_ids] == stream.result.token_ids
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == stream.result.finish_reason

    def test_several_tokens_a_step(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        everything = tokenizer.encode("one two three four").tolist()
        pipe, _ = make([everything[:3], everything[3:]])
        stream = pipe.stream("x", max_new_tokens=50)
        assert [c.token_ids for c in stream][:2] == [everything[:3], everything[3:]]
        metrics = stream.result.metrics
        assert metrics.generated_tokens == len(everything)
        assert metrics.inter_token_ms[:2] == (0.0, 0.0)

    def test_a_step_past_the_limit_is_cut(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        everything = tokenizer.encode("one two three four").tolist()
        pipe, _ = make([everything])
        result = pipe.generate("x", max_new_tokens=2)
        assert (result.token_ids, result.finish_reason) == (everything[:2], "length")

    def test_no_token_at_all(self, make: MakePipe) -> None:
        pipe, _ = make([])
        stream = pipe.stream("x", max_new_tokens=5)
        assert [c.text for c in stream] == [""]
        assert stream.result.metrics.ttft_ms is None
        assert stream.result.metrics.tokens_per_second is None

    def test_chunks_come_once(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(ids(tokenizer, "a b"))
        stream = pipe.stream("x", max_new_tokens=5)
        list(stream)
        with pytest.raises(StreamError, match="already read"):
            list(stream)

    def test_result_without_reading(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(ids(tokenizer, "a b c"))
        assert pipe.stream("x", max_new_tokens=50).result.text == "a b c"

    async def test_async_is_the_same(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(ids(tokenizer, "Hello 🦙 world"))
        stream = pipe.stream("x", max_new_tokens=50)
        assert "".join([c.text async for c in stream]) == "Hello 🦙 world"
        assert (await stream.aresult()).text == "Hello 🦙 world"

    async def test_async_leaves_the_loop_free(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        gate = threading.Semaphore(0)
        pipe, _ = make(ids(tokenizer, "a b c"), gate=gate)
        stream = pipe.stream("x", max_new_tokens=50)
        reading = asyncio.ensure_future(stream.aresult())
        for _ in range(3):
            await asyncio.sleep(0)  # the loop turns while the engine waits for us
            assert not reading.done()
            gate.release()
        assert (await reading).text == "a b c"

    def test_a_stop_token_at_the_limit_is_a_stop(self, make: MakePipe) -> None:
        pipe, _ = make(forever([WORD]))
        result = pipe.generate("x", max_new_tokens=2, stop_token_ids=[WORD])
        assert result.finish_reason == "stop"

    def test_end_tokens_end_it(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        end = tokenizer.control_tokens["<|end|>"]
        pipe, _ = make([*ids(tokenizer, "a"), [end]])
        result = pipe.generate("x", max_new_tokens=2)
        assert (result.text, result.finish_reason, result.token_ids[-1]) == ("a", "stop", end)


class TestStopStrings:
    """Never a piece of one is shown; the engine is told to stop."""

    def test_over_several_tokens(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, backend = make(ids(tokenizer, "one STOP two three"))
        stream = pipe.stream("x", max_new_tokens=50, stop=["STOP"])
        shown = [c.text for c in stream]
        assert "".join(shown) == stream.result.text == "one "
        assert (stream.result.finish_reason, stream.result.stop_string) == ("stop", "STOP")
        assert backend.running == 0

    def test_the_engine_stops(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(forever(tokenizer.encode(" a").tolist()))
        assert pipe.generate("x", max_new_tokens=100, stop=" a a a").text == ""

    def test_included_when_asked(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(ids(tokenizer, "one STOP two"))
        assert pipe.generate("x", max_new_tokens=50, stop="STOP", include_stop=True).text == "one STOP"

    def test_a_beginning_that_came_to_nothing_is_shown(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(ids(tokenizer, "one STO"))
        stream = pipe.stream("x", max_new_tokens=50, stop="STOP")
        assert "".join(c.text for c in stream) == stream.result.text == "one STO"


class TestCancelling:
    """However a consumer leaves, the engine stops within one step."""

    def test_from_another_thread(self, make: MakePipe) -> None:
        pipe, backend = make(forever([WORD]), window=10**9)
        stream = pipe.stream("x")
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        stream.cancel()
        reader.join(30)
        assert stream.result.finish_reason == "cancelled"
        assert backend.running == 0

    def test_leaving_a_for_loop(self, make: MakePipe) -> None:
        pipe, backend = make(forever([WORD]), window=10**9, gate=(gate := threading.Semaphore(3)))
        stream = pipe.stream("x")
        for _ in stream:
            break
        gate.release(5)
        assert stream.result.finish_reason == "cancelled"
        assert backend.running == 0

    def test_leaving_a_with_block_waits_for_the_engine(self, make: MakePipe) -> None:
        pipe, backend = make(forever([WORD]), window=10**9)
        with pytest.raises(KeyError), pipe.stream("x") as stream:
            raise KeyError
        assert stream.done
        assert backend.running == 0

    def test_dropping_the_stream(self, make: MakePipe) -> None:
        gate = threading.Semaphore(0)
        pipe, _ = make(forever([WORD]), window=10**9, gate=gate)
        stream = pipe.stream("x")
        channel = stream.channel
        del stream
        gc.collect()
        assert channel.cancelled
        gate.release()
        channel.wait_ended()

    async def test_leaving_an_async_for_loop(self, make: MakePipe) -> None:
        pipe, _ = make(forever([WORD]), window=10**9)
        stream = pipe.stream("x")
        async for _ in stream:
            break
        assert (await stream.aresult()).finish_reason == "cancelled"

    async def test_cancelling_the_task(self, make: MakePipe) -> None:
        gate = threading.Semaphore(0)
        pipe, _ = make(forever([WORD]), window=10**9, gate=gate)
        stream = pipe.stream("x")

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.release()
        assert (await stream.aresult()).finish_reason == "cancelled"

    async def test_async_with(self, make: MakePipe) -> None:
        pipe, backend = make(forever([WORD]), window=10**9)
        async with pipe.stream("x") as stream:
            pass
        assert stream.done
        assert backend.running == 0

    @pytest.mark.skipif(os.name == "nt", reason="signals to oneself are POSIX")
    def test_ctrl_c_while_waiting(self, make: MakePipe) -> None:
        gate = threading.Semaphore(1)
        main = threading.main_thread().ident
        assert main is not None

        def interrupt(step: int) -> None:
            if step == 1:
                signal.pthread_kill(main, signal.SIGINT)

        pipe, _ = make(forever([WORD]), window=10**9, gate=gate, before_step=interrupt)
        stream = pipe.stream("x")
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                gate.release()
        gate.release(5)
        assert stream.result.finish_reason == "cancelled"

    def test_cancelling_twice_and_late_is_harmless(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(ids(tokenizer, "a"))
        stream = pipe.stream("x", max_new_tokens=5)
        assert stream.result.text == "a"
        stream.cancel()
        stream.cancel()
        assert stream.result.finish_reason != "cancelled"


class TestErrors:
    """Raised in the consumer, of our kind, and the pipeline goes on."""

    def test_of_the_engine(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, backend = make(ids(tokenizer, "a b"), failure=RuntimeError("Exception from src/x.cpp:1:\nout of luck"))
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
        pipe, _ = make(ids(tokenizer, "a b"))
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


class TestTurns:
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


class TestCtrlC:
    """It may come between any two instructions; the line in front of the engine is left whatever happens."""

    def test_while_taking_a_place_in_the_line(self, make: MakePipe, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_a_stream_dropped_inside_the_line_does_not_lock_it(self, make: MakePipe) -> None:
        """The garbage collector runs where it likes: here while the line's own lock is held."""
        gate = threading.Semaphore(0)
        pipe, _ = make([[WORD]], gate=gate)
        first = pipe.stream("x")
        waiting = pipe.stream("x")
        with pipe.engine._queue._lock:
            del waiting
            gc.collect()
        gate.release(2)
        assert first.result.token_ids == pipe.generate("x").token_ids == [WORD]

    def test_a_record_that_cannot_be_kept_still_ends_the_stream(self, make: MakePipe) -> None:
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
    """Nothing runs on."""

    def test_running_streams_are_cancelled(self, make: MakePipe) -> None:
        pipe, backend = make(forever([WORD]), window=10**9)
        stream = pipe.stream("x")
        pipe.close()
        assert stream.done
        assert stream.result.finish_reason == "cancelled"
        assert backend.closed

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
