"""A reply while it is being generated: a worker thread at one end, a sync or async consumer at the other.

The engine runs in a thread of its own, so that Ctrl-C and event loops keep working in the consumer's. The two ends
meet in a `Channel` only. The thread never holds the `TokenStream`, so a stream that nobody holds any more cancels
itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any

from ov_phi3.errors import ClosedError, StreamError, forked
from ov_phi3.generation.results import GenerationResult, StreamChunk

__all__ = ["Channel", "TokenStream"]

# On Windows a thread that waits on a lock does not see Ctrl-C until the wait ends, so the wait is cut into pieces
# there.
_WAIT = 0.1 if sys.platform == "win32" else None


class Channel:
    """What the worker and the consumer share: chunks one way, a wish to stop the other way."""

    def __init__(self) -> None:
        self._changed = threading.RLock()  # and not a Condition: see `turns`
        self._chunks: deque[StreamChunk] = deque()
        self._listeners: list[Callable[[], None]] = []
        self._on_cancel: Callable[[], None] | None = None
        self.cancelled = False
        self.ended = False
        self.error: BaseException | None = None
        self.result: GenerationResult | None = None

    # -- the worker's end --------------------------------------------------------------------------------------------

    def put(self, chunk: StreamChunk) -> None:
        """Hand over a chunk; never waits for the consumer."""
        with self._changed:
            self._chunks.append(chunk)
            self._tell()

    def end(
        self, result: GenerationResult | None, error: BaseException | None = None, *, last: StreamChunk | None = None
    ) -> None:
        """No more chunks but the last; a result or an error is given.

        The last chunk comes with the end, so that whoever has read it may start the next request.
        """
        with self._changed:
            if last is not None:
                self._chunks.append(last)
            self.result, self.error = result, error
            self.ended = True
            self._on_cancel = None
            self._tell()

    def on_cancel(self, action: Callable[[], None] | None) -> None:
        """What else `cancel` must do, for a worker that is waiting; run at once if it was cancelled before."""
        with self._changed:
            self._on_cancel = action
            late = self.cancelled
        if late and action is not None:
            action()

    def abandon(self) -> None:
        """End it in a forked process, which does not have the worker."""
        self._changed = threading.RLock()
        if not self.ended:
            self.error = ClosedError(forked("this stream's pipeline", os.getppid()))
            self._listeners = []
            self.ended = True

    # -- the consumer's end ------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask the worker to stop; it does within one token."""
        with self._changed:
            if self.cancelled or self.ended:
                return
            self.cancelled = True
            action = self._on_cancel
        if action is not None:
            action()

    def take(self) -> StreamChunk | None:
        """A chunk that is there already, or None; after the last one the worker's error is raised."""
        with self._changed:
            return self._take()

    def wait(self) -> StreamChunk | None:
        """The next chunk, waiting for it; None at the end."""
        self._block(for_end=False)
        return self.take()

    def wait_ended(self) -> None:
        """Wait until the worker is done."""
        self._block(for_end=True)

    def _block(self, *, for_end: bool) -> None:
        """Wait until there is a chunk or the end; with `for_end`, until the end."""
        while True:
            gate = threading.Lock()
            gate.acquire()
            if not self.listen(gate.release, for_end=for_end):
                return
            if _WAIT is None:
                gate.acquire()
            else:
                while not gate.acquire(timeout=_WAIT):
                    pass

    def listen(self, action: Callable[[], None], *, for_end: bool = False) -> bool:
        """Call `action` once at the next change; False when there is something to see already (`for_end`: the end)."""
        with self._changed:
            if self.ended or (self._chunks and not for_end):
                return False
            self._listeners.append(action)
            return True

    @property
    def drained(self) -> bool:
        """Whether it has ended and every chunk was taken."""
        with self._changed:
            return self.ended and not self._chunks

    def _take(self) -> StreamChunk | None:
        if self._chunks:
            return self._chunks.popleft()
        if self.ended and self.error is not None:
            raise self.error
        return None

    def _tell(self) -> None:
        listeners, self._listeners = self._listeners, []
        for action in listeners:
            action()


def _abandon_all() -> None:
    """In a forked process nobody writes to the channels any more, and their locks may be held for ever."""
    for channel in list(_running):
        channel.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)

_running: weakref.WeakSet[Channel] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def new_worker(channel: Channel, work: Callable[[], None]) -> threading.Thread:
    """A thread for `work`, not started yet, that ends with the interpreter.

    It is cancelled and joined before the engine is torn down. A daemon, as the interpreter would otherwise wait for the
    whole reply before it runs any exit handler.
    """
    thread = threading.Thread(target=work, name="ov_phi3-stream", daemon=True)
    _running.add(channel)
    _threads.add(thread)
    return thread


@atexit.register
def _stop_all() -> None:
    for channel in list(_running):
        channel.cancel()
    for thread in list(_threads):
        if thread.is_alive():
            thread.join()


class TokenStream:
    """A reply as it comes: iterate it, `async for` it, or use it as a context manager. Made by `Pipeline.stream`.

    Leaving a loop or a `with` block early cancels the reply, and so does dropping the stream. Chunks can be read once;
    `result` can be read any number of times.
    """

    _read_by: str | None = None

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __repr__(self) -> str:
        state = "ended" if self._channel.ended else "cancelled" if self._channel.cancelled else "running"
        return f"<TokenStream {state}>"

    @property
    def result(self) -> GenerationResult:
        """The whole reply; waits until it has ended.

        Raises:
            Error: what ended the reply, when it failed.
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
    """Cancel when `owner` goes; one whose making was interrupted has nothing to cancel."""
    channel: Channel | None = getattr(owner, "_channel", None)
    if channel is not None:
        channel.cancel()


class _CancelOnError:
    """Cancels when a wait ends by KeyboardInterrupt or a cancelled task."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._channel.cancel()


class _Chunks:
    """One reading of a stream. A class and not a generator, so that dropping it cancels in every Python at once."""

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
                drained = self._channel.drained  # asked first: what comes in between is then seen by take
                chunk = self._channel.take()
                if chunk is not None:
                    return chunk
                if drained:
                    raise StopAsyncIteration
                await _next_change(self._channel)

    def __del__(self) -> None:
        _cancel(self)


async def _next_change(channel: Channel, *, ended: bool = False) -> None:
    """Wait in the event loop until the channel has a chunk or has ended; with `ended`, chunks that wait do not
    count.
    """
    import asyncio  # costs 1.3 MiB, which who has no event loop need not pay

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    def from_worker() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(wake)

    if channel.listen(from_worker, for_end=ended):
        await future


def now() -> float:
    """The clock of all our stamps, in seconds."""
    return time.perf_counter()


def never_raises(emit: Callable[..., bool], failed: Callable[[BaseException], Any]) -> Callable[..., bool]:
    """An `emit` whose exceptions go to `failed` and stop the engine, instead of crossing into it."""

    def guarded(ids: Any, logprobs: Any = ()) -> bool:
        try:
            return emit(ids, logprobs) if logprobs else emit(ids)
        except BaseException as exc:  # noqa: BLE001 - an exception that leaves a callback aborts the process
            failed(exc)
            return False

    return guarded
