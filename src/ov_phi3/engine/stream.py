"""A reply while it is generated: sync and async iteration, the result, and cancelling.

The reply is produced in a thread of its own, so that Ctrl-C and event loops keep working in the consumer's thread. The
two threads meet only in a `Channel`. The worker never holds the `TokenStream`, so a stream that is no longer referenced
cancels itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from types import TracebackType

from ov_phi3.engine.channel import Channel
from ov_phi3.errors import StreamError
from ov_phi3.generation.results import GenerationResult, StreamChunk

__all__ = ["TokenStream"]


class TokenStream:
    """A reply while it is generated: iterate it, `async for` it, or use it as a context manager.

    Made by `Pipeline.stream`. Leaving a loop or a `with` block early cancels the reply, and so does dropping the
    stream. Chunks can be read once; `result` can be read any number of times.
    """

    _read_by: str | None = None

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def channel(self) -> Channel:
        """The channel between the reply's worker and this stream."""
        return self._channel

    def __repr__(self) -> str:
        state = "ended" if self._channel.ended else "cancelled" if self._channel.cancelled else "running"
        return f"<TokenStream {state}>"

    @property
    def result(self) -> GenerationResult:
        """The whole reply; waits until it has ended.

        Raises:
            Error: the error that ended the reply.
        """
        with self._cancelling_on_error():
            self._channel.wait_ended()
        if self._channel.error is not None:
            raise self._channel.error
        assert self._channel.result is not None
        return self._channel.result

    @property
    def done(self) -> bool:
        """Whether the reply has ended, so that `result` does not wait."""
        return self._channel.ended

    def cancel(self) -> None:
        """Stop the reply within one token; from any thread, any number of times. `result` then has what came so far."""
        self._channel.cancel()

    async def aresult(self) -> GenerationResult:
        """`result` for event loops: waits without blocking the loop; cancelling the task cancels the reply."""
        with self._cancelling_on_error():
            while not self._channel.ended:
                await _next_change(self._channel, ended=True)
        return self.result

    def __iter__(self) -> Iterator[StreamChunk]:
        self._read_once("a for loop")
        with self._cancelling_on_error():
            return _Chunks(self._channel)

    def __aiter__(self) -> AsyncIterator[StreamChunk]:
        self._read_once("an async for loop")
        with self._cancelling_on_error():
            return _AsyncChunks(self._channel)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.cancel()
        self._channel.wait_ended()

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._channel.cancel()
        while not self._channel.ended:
            await _next_change(self._channel, ended=True)

    def __del__(self) -> None:
        # Chunks still being read are held by their own iterator, which cancels when it goes.
        if self._read_by is None:
            _cancel(self)

    def _read_once(self, reader: str) -> None:
        if self._read_by is not None:
            raise StreamError(
                f"the stream was already read by {self._read_by}; its chunks come once. Use stream.result for the "
                "whole reply, or start another stream."
            )
        self._read_by = reader

    def _cancelling_on_error(self) -> _CancelOnError:
        return _CancelOnError(self._channel)


def _cancel(owner: TokenStream | _Chunks | _AsyncChunks) -> None:
    """Cancel when `owner` is freed; an object whose construction was interrupted has no channel."""
    channel: Channel | None = getattr(owner, "_channel", None)
    if channel is not None:
        channel.cancel()


class _CancelOnError:
    """Cancels if a wait ends by KeyboardInterrupt or a cancelled task."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._channel.cancel()


class _Chunks:
    """Iterator over a stream. A class, not a generator, so that dropping it cancels at once in every Python."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __iter__(self) -> Iterator[StreamChunk]:
        return self

    def __next__(self) -> StreamChunk:
        with _CancelOnError(self._channel):
            chunk = self._channel.wait()
        if chunk is None:
            raise StopIteration
        return chunk

    def __del__(self) -> None:
        _cancel(self)


class _AsyncChunks:
    """The same for `async for`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __aiter__(self) -> AsyncIterator[StreamChunk]:
        return self

    async def __anext__(self) -> StreamChunk:
        with _CancelOnError(self._channel):
            while True:
                drained = self._channel.drained  # read first: a chunk that arrives in between is then seen by take
                chunk = self._channel.take()
                if chunk is not None:
                    return chunk
                if drained:
                    raise StopAsyncIteration
                await _next_change(self._channel)

    def __del__(self) -> None:
        _cancel(self)


async def _next_change(channel: Channel, *, ended: bool = False) -> None:
    """Wait in the event loop until the channel has a chunk or has ended; with `ended`, only until it has ended."""
    import asyncio  # 1.3 MiB, only for programs that have an event loop

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    def from_worker() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, so nothing waits
            loop.call_soon_threadsafe(wake)

    if channel.listen(from_worker, for_end=ended):
        await future
