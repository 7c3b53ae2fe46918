"""The channel between a reply's worker and its consumer."""

from __future__ import annotations

import threading

import pytest

from ov_phi3 import ClosedError, GenerationError, StreamChunk, StreamError
from ov_phi3.engine.channel import Channel


def chunk(text: str) -> StreamChunk:
    return StreamChunk(text, [1])


def test_chunks_arrive_in_order_and_the_last_one_with_the_end() -> None:
    channel = Channel()
    channel.put(chunk("a"))
    channel.put(chunk("b"))
    channel.end(None, last=chunk("c"))
    assert [piece.text for piece in iter(channel.wait, None)] == ["a", "b", "c"]
    assert channel.drained
    assert channel.take() is None


def test_an_error_is_raised_behind_the_last_chunk() -> None:
    channel = Channel()
    channel.put(chunk("a"))
    channel.end(None, GenerationError("broken"))
    assert channel.take() is not None
    for _ in range(2):
        with pytest.raises(GenerationError, match="broken"):
            channel.take()


def test_cancel_runs_the_action_once() -> None:
    channel, actions = Channel(), []
    channel.on_cancel(lambda: actions.append(1))
    channel.cancel()
    channel.cancel()
    assert (channel.cancelled, actions) == (True, [1])


def test_an_action_that_comes_after_the_cancel_runs_at_once() -> None:
    channel, actions = Channel(), []
    channel.cancel()
    channel.on_cancel(lambda: actions.append(1))
    assert actions == [1]


def test_cancel_after_the_end_has_no_effect() -> None:
    channel, actions = Channel(), []
    channel.on_cancel(lambda: actions.append(1))
    channel.end(None)
    channel.cancel()
    assert (channel.cancelled, actions) == (False, [])


def test_a_listener_is_called_once() -> None:
    channel, calls = Channel(), []
    assert channel.listen(lambda: calls.append("chunk"))
    assert channel.listen(lambda: calls.append("end"), for_end=True)
    channel.put(chunk("a"))
    channel.put(chunk("b"))
    assert calls == ["chunk"]
    assert not channel.listen(lambda: calls.append("never"))
    channel.end(None)
    assert calls == ["chunk", "end"]
    assert not channel.listen(lambda: calls.append("never"), for_end=True)
    assert calls == ["chunk", "end"]


def test_a_consumer_waits_for_chunks_and_for_the_end() -> None:
    channel, waiting = Channel(), threading.Semaphore(0)
    real, texts = channel.listen, []

    def listen(action: object, *, for_end: bool = False) -> bool:
        waits = real(action, for_end=for_end)  # type: ignore[arg-type]
        waiting.release()
        return waits

    channel.listen = listen  # type: ignore[method-assign]

    def read() -> None:
        first = channel.wait()
        texts.append("" if first is None else first.text)
        channel.wait_ended()
        texts.append("ended")

    reader = threading.Thread(target=read)
    reader.start()
    assert waiting.acquire(timeout=30)
    channel.put(chunk("a"))
    assert waiting.acquire(timeout=30)
    channel.put(chunk("b"))
    channel.end(None)
    reader.join(30)
    assert texts == ["a", "ended"]


def test_the_worker_cannot_wait_for_itself() -> None:
    channel = Channel()
    channel.attach_worker()
    channel.put(chunk("a"))
    for wait in (channel.wait, channel.wait_ended):
        with pytest.raises(StreamError, match="from inside its own callback"):
            wait()
    channel.end(None)
    assert channel.wait() is not None
    channel.wait_ended()


def test_in_a_fork_the_reply_ends_with_an_error() -> None:
    channel = Channel()
    channel.abandon()
    assert channel.ended
    with pytest.raises(ClosedError, match="fork"):
        channel.take()
