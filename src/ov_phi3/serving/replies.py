"""Replies for HTTP requests: admitted while there is room, run in the engine's threads, cancelled with their client.

Everything here runs in the event loop, except what may take long (encoding, compiling a schema), which runs in threads
of this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from ov_phi3.engine.stream import TokenStream
from ov_phi3.errors import ConfigError
from ov_phi3.serving.metrics import ServerMetrics

if TYPE_CHECKING:
    from ov_phi3.generation.results import GenerationResult, StreamChunk
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.serving.guard import Receive
    from ov_phi3.serving.openai_requests import ReplyRequest

__all__ = ["Busy", "ClientGone", "Replies", "ReplyRunner", "until_gone"]

_THREADS = 4
T = TypeVar("T")


class Busy(Exception):  # noqa: N818 - a state, not a fault
    """The queue is full.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s.")
        self.retry_after = retry_after


class ClientGone(Exception):  # noqa: N818
    """The client has closed its connection."""


class ReplyRunner:
    """Starts replies on a pipeline, as many as may run and wait.

    Args:
        pipe: the model.
        max_queue: replies that may wait, besides those that run.
        max_tokens: longest reply, in tokens; None for the context window.
        timeout: longest time of a reply, in seconds, the wait included; None for any.

    Attributes:
        metrics: the counters of this server.
    """

    def __init__(self, pipe: Pipeline, *, max_queue: int, max_tokens: int | None, timeout: float | None) -> None:
        self._pipe = pipe
        self._capacity = pipe.concurrency + max_queue
        self._max_tokens = max_tokens
        self._timeout = timeout
        self._active: set[Replies] = set()
        self._claimed = 0
        self._mean_seconds = 1.0
        self._threads = ThreadPoolExecutor(_THREADS, "ov_phi3-serve")
        self.metrics = ServerMetrics()

    @property
    def running(self) -> int:
        """Replies that are computed now."""
        return min(self._claimed, self._pipe.concurrency)

    @property
    def waiting(self) -> int:
        """Replies that wait."""
        return self._claimed - self.running

    @property
    def full(self) -> bool:
        """Whether one more reply would be refused."""
        return self._claimed >= self._capacity

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run something that takes long, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def start(self, request: ReplyRequest) -> Replies:
        """Start all replies of a request.

        Raises:
            Busy: there is no room for them now.
            ConfigError: there is never room for so many, or an option is wrong.
            Error: what `Pipeline.stream` raises.
        """
        count = request.count
        if count > self._capacity:
            raise ConfigError(f"{count} replies in one request; this server takes at most {self._capacity} at once.")
        longest = request.config.max_new_tokens
        if self._max_tokens is not None and longest is not None and longest > self._max_tokens:
            raise ConfigError(f"max_tokens={longest}; this server gives at most {self._max_tokens}.")
        if self._claimed + count > self._capacity:
            raise Busy(max(1, round(self._claimed / self._pipe.concurrency * self._mean_seconds)))
        self._claimed += count
        replies = Replies(request, self._end)
        self._active.add(replies)
        try:
            await replies.start(self._open, self.in_thread)
        except BaseException:
            await replies.close()
            raise
        return replies

    def _open(self, request: ReplyRequest, at: int) -> TokenStream:
        """Start one reply; in a thread."""
        config = request.config_of(at % request.n)
        if self._max_tokens is not None and config.max_new_tokens is None and config.max_length is None:
            config = config.replace(max_new_tokens=self._room(request, at))
        return self._pipe.stream(
            request.prompts[at // request.n],
            config,
            timeout=self._timeout,
            continue_final_message=request.continue_final_message,
            **(request.tools or {}),
        )

    def _room(self, request: ReplyRequest, at: int) -> int:
        """The server's limit, or what the context window leaves of it."""
        assert self._max_tokens is not None
        prompt = request.prompts[at // request.n]
        tools = (request.tools or {}).get("tools")
        used = self._pipe.count_tokens(prompt, continue_final_message=request.continue_final_message, tools=tools)
        return max(1, min(self._max_tokens, self._pipe.context_length - used))

    def _end(self, replies: Replies) -> None:
        """Give back the room of a request; count what came of it."""
        if replies not in self._active:
            return
        self._active.discard(replies)
        self._claimed -= replies.request.count
        for result in replies.ended():
            self.metrics.add_reply(result)
            self._mean_seconds += 0.2 * (result.metrics.total_ms / 1000.0 - self._mean_seconds)

    async def close(self) -> None:
        """Cancel all replies, and end the threads."""
        for replies in list(self._active):
            await replies.close()
        self._threads.shutdown(wait=True)


class Replies:
    """The running replies of one request, in order: all replies to the first prompt, then those to the next.

    Args:
        request: the request.
        on_end: called when the last one has ended.

    Attributes:
        request: see above.
        streams: the replies.
    """

    def __init__(self, request: ReplyRequest, on_end: Callable[[Replies], None]) -> None:
        self.request = request
        self.streams: list[TokenStream] = []
        self._on_end = on_end

    async def start(
        self,
        open_stream: Callable[[ReplyRequest, int], TokenStream],
        in_thread: Callable[[Callable[[], TokenStream]], Awaitable[TokenStream]],
    ) -> None:
        """Start every reply. If the task is cancelled meanwhile, no reply is left running."""
        for at in range(self.request.count):
            opening = asyncio.ensure_future(in_thread(lambda at=at: open_stream(self.request, at)))  # type: ignore[misc]
            try:
                self.streams.append(await asyncio.shield(opening))
            except asyncio.CancelledError:
                with suppress(Exception):
                    self.streams.append(await opening)
                raise

    async def results(self) -> list[GenerationResult]:
        """All results; waits for them.

        Raises:
            Error: the first error of a reply.
        """
        return [await stream.aresult() for stream in self.streams]

    async def chunks(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """The chunks of all replies as they come, each with the index of its reply.

        Raises:
            Error: the error of a reply.
        """
        arrived: asyncio.Queue[tuple[int, StreamChunk | BaseException | None]] = asyncio.Queue()

        async def read(at: int, stream: TokenStream) -> None:
            try:
                async for chunk in stream:
                    arrived.put_nowait((at, chunk))
                arrived.put_nowait((at, None))
            except Exception as exc:  # noqa: BLE001 - raised again below
                arrived.put_nowait((at, exc))

        readers = [asyncio.ensure_future(read(at, stream)) for at, stream in enumerate(self.streams)]
        left = len(readers)
        try:
            while left:
                at, item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield at, item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    def ended(self) -> list[GenerationResult]:
        """The results that there are."""
        channels = [stream.channel for stream in self.streams]
        return [channel.result for channel in channels if channel.result is not None]

    async def close(self) -> None:
        """Cancel what still runs, wait until it has ended, and give back the room."""
        for stream in self.streams:
            stream.cancel()
        try:
            for stream in self.streams:
                async with stream:
                    pass
        finally:
            self._on_end(self)


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for `work`, or cancel it when the client goes away.

    Raises:
        ClientGone: the client went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
