"""What a reply's worker and its consumer share: chunks in one direction, the request to stop in the other."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ov_phi3.backends.request_queue import is_engine_thread
from ov_phi3.errors import ClosedError, StreamError, forked

if TYPE_CHECKING:
    from ov_phi3.generation.results import GenerationResult, StreamChunk

__all__ = ["Channel"]

# On Windows a thread that waits for a lock does not see Ctrl-C until the wait ends, so the wait is divided there.
_WAIT_S = 0.1 if sys.platform == "win32" else -1.0

Listener = Callable[[], None]


class Channel:
    """Chunks of one reply, its end, and the request to stop it.

    Attributes:
        cancelled: the consumer asked to stop.
        ended: no more chunks come.
        error: what ended the reply, when it failed.
        result: the whole reply, once it has ended without an error.
    """

    def __init__(self) -> None:
        self._changed = threading.RLock()  # not a Condition: see `request_queue`
        self._chunks: deque[StreamChunk] = deque()
        self._chunk_listeners: list[Listener] = []
        self._end_listeners: list[Listener] = []
        self._on_cancel: Listener | None = None
        self._worker: int | None = None
        self.cancelled = False
        self.ended = False
        self.error: BaseException | None = None
        self.result: GenerationResult | None = None

    # -- the worker's end --------------------------------------------------------------------------------------------

    def attach_worker(self) -> None:
        """Note that this thread produces the reply, so that it can never wait for it."""
        self._worker = threading.get_ident()

    def put(self, chunk: StreamChunk) -> None:
        """Deliver a chunk; never waits for the consumer."""
        with self._changed:
            self._chunks.append(chunk)
            self._notify(self._chunk_listeners)

    def end(
        self, result: GenerationResult | None, error: BaseException | None = None, *, last: StreamChunk | None = None
    ) -> None:
        """End the reply, with a result or an error.

        The last chunk is delivered together with the end, so that a consumer that has read it may start the next
        request.
        """
        with self._changed:
            if last is not None:
                self._chunks.append(last)
            self.result, self.error = result, error
            self.ended = True
            self._on_cancel = None
            self._notify(self._chunk_listeners)
            self._notify(self._end_listeners)

    def on_cancel(self, action: Listener | None) -> None:
        """What `cancel` must also do, for a worker that is waiting; called at once if it was cancelled before."""
        with self._changed:
            self._on_cancel = action
            late = self.cancelled
        if late and action is not None:
            action()

    def abandon(self) -> None:
        """End the reply in a forked process, where the worker does not exist."""
        self._changed = threading.RLock()
        if not self.ended:
            self.error = ClosedError(forked("this stream's pipeline", os.getppid()))
            self._chunk_listeners, self._end_listeners = [], []
            self.ended = True

    # -- the consumer's end ------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask the worker to stop, within one token."""
        with self._changed:
            if self.cancelled or self.ended:
                return
            self.cancelled = True
            action = self._on_cancel
        if action is not None:
            action()

    def take(self) -> StreamChunk | None:
        """A chunk that has arrived, or None; after the last chunk the worker's error is raised."""
        with self._changed:
            if self._chunks:
                return self._chunks.popleft()
            if self.ended and self.error is not None:
                raise self.error
            return None

    def wait(self) -> StreamChunk | None:
        """The next chunk, waiting for it; None at the end."""
        self._block(for_end=False)
        return self.take()

    def wait_ended(self) -> None:
        """Wait until the reply has ended."""
        self._block(for_end=True)

    def _block(self, *, for_end: bool) -> None:
        """Wait until there is a chunk or the end; with `for_end`, until the end."""
        if (self._worker == threading.get_ident() or is_engine_thread()) and not self.ended:
            raise StreamError(
                "a stream was read from inside its own callback (on_prefill, a logits processor), and would wait for "
                "itself. Return from the callback first."
            )
        while True:  # another reader may take the chunk that ended the wait
            gate = threading.Lock()
            gate.acquire()
            if not self.listen(gate.release, for_end=for_end):
                return
            while not gate.acquire(timeout=_WAIT_S):
                pass

    def listen(self, action: Listener, *, for_end: bool = False) -> bool:
        """Call `action` once, at the next chunk or the end, with `for_end` at the end only.

        Returns:
            False if there is nothing to wait for: a chunk, or the end, has arrived.
        """
        with self._changed:
            if self.ended or (self._chunks and not for_end):
                return False
            (self._end_listeners if for_end else self._chunk_listeners).append(action)
            return True

    @property
    def drained(self) -> bool:
        """Whether the reply has ended and every chunk was taken."""
        with self._changed:
            return self.ended and not self._chunks

    @staticmethod
    def _notify(listeners: list[Listener]) -> None:
        actions, listeners[:] = list(listeners), []
        for action in actions:
            action()
