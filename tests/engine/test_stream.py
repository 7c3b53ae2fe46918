"""Streams on a scripted backend: order, endings and cancelling."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading

import pytest
from scripted import WORD, MakePipe, forever, steps_of

from ov_phi3 import StreamError, Tokenizer


class TestReading:
    """Chunks in order, once, adding up."""

    def test_chunks_add_up(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(steps_of(tokenizer, "Hello 🦙 world"))
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
        pipe, _ = make(steps_of(tokenizer, "a b"))
        stream = pipe.stream("x", max_new_tokens=5)
        list(stream)
        with pytest.raises(StreamError, match="already read"):
            list(stream)

    def test_result_without_reading(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(steps_of(tokenizer, "a b c"))
        assert pipe.stream("x", max_new_tokens=50).result.text == "a b c"

    async def test_async_is_the_same(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(steps_of(tokenizer, "Hello 🦙 world"))
        stream = pipe.stream("x", max_new_tokens=50)
        assert "".join([c.text async for c in stream]) == "Hello 🦙 world"
        assert (await stream.aresult()).text == "Hello 🦙 world"

    async def test_async_leaves_the_loop_free(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        gate = threading.Semaphore(0)
        pipe, _ = make(steps_of(tokenizer, "a b c"), gate=gate)
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
        pipe, _ = make([*steps_of(tokenizer, "a"), [end]])
        result = pipe.generate("x", max_new_tokens=2)
        assert (result.text, result.finish_reason, result.token_ids[-1]) == ("a", "stop", end)


class TestStopStrings:
    """Never a piece of one is shown; the engine is told to stop."""

    def test_over_several_tokens(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, backend = make(steps_of(tokenizer, "one STOP two three"))
        stream = pipe.stream("x", max_new_tokens=50, stop=["STOP"])
        shown = [c.text for c in stream]
        assert "".join(shown) == stream.result.text == "one "
        assert (stream.result.finish_reason, stream.result.stop_string) == ("stop", "STOP")
        assert backend.running == 0

    def test_the_engine_stops(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(forever(tokenizer.encode(" a").tolist()))
        assert pipe.generate("x", max_new_tokens=100, stop=" a a a").text == ""

    def test_included_when_asked(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(steps_of(tokenizer, "one STOP two"))
        assert pipe.generate("x", max_new_tokens=50, stop="STOP", include_stop=True).text == "one STOP"

    def test_a_beginning_that_came_to_nothing_is_shown(self, make: MakePipe, tokenizer: Tokenizer) -> None:
        pipe, _ = make(steps_of(tokenizer, "one STO"))
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
        pipe, _ = make(steps_of(tokenizer, "a"))
        stream = pipe.stream("x", max_new_tokens=5)
        assert stream.result.text == "a"
        stream.cancel()
        stream.cancel()
        assert stream.result.finish_reason != "cancelled"
