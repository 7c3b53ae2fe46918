"""Queue of the requests that wait for one engine: first in, first out, a fixed number at a time.

Ctrl-C can raise in the main thread between any two Python instructions, also inside `threading.Event` and `Condition`,
which are written in Python and would then keep their lock for ever. Only locks that are a single C call are used here.
They are re-entrant, because the garbage collector can cancel a dropped stream while its own thread holds the lock.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from ov_phi3.errors import StreamError

__all__ = ["RequestQueue", "Ticket", "is_engine_thread", "mark_engine_thread"]


_this_thread = threading.local()


def mark_engine_thread() -> None:
    """Note that this thread runs requests of others: it must never wait for one."""
    _this_thread.runs_requests = True


def is_engine_thread() -> bool:
    """Whether this thread runs requests of others."""
    return getattr(_this_thread, "runs_requests", False)


class Ticket:
    """One position in the queue.

    Args:
        exclusive: run with no other request at the same time.

    Attributes:
        exclusive: see above.
        abandoned: the wait was given up.
        started: the request runs, or has run.
        thread: identifier of the thread that the request runs in, once it has started.
    """

    def __init__(self, *, exclusive: bool = False) -> None:
        self.exclusive = exclusive
        self.abandoned = False
        self.started = False
        self.thread: int | None = None
        self._gate = threading.Lock()  # closed until the request may run
        self._gate.acquire()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the request may run or was abandoned; False if that takes longer than `seconds`."""
        return self._gate.acquire(timeout=-1 if seconds is None else max(0.0, min(seconds, threading.TIMEOUT_MAX)))

    def release(self) -> None:
        """Let the waiting thread continue."""
        with contextlib.suppress(RuntimeError):  # open already
            self._gate.release()


class RequestQueue:
    """First in, first out; the first `width` tickets run at the same time. `threading.Lock` guarantees no order.

    Args:
        width: requests that run at the same time.

    Attributes:
        on_empty: called when the last ticket has left.
    """

    def __init__(self, width: int = 1) -> None:
        self._width = width
        self.on_empty: Callable[[], None] | None = None
        self._lock = threading.RLock()
        self._tickets: deque[Ticket] = deque()

    def join(self, ticket: Ticket) -> None:
        """Add a ticket at the end.

        Raises:
            StreamError: this thread runs a request of this queue, so that waiting would never end.
        """
        self.check_not_inside("a request")
        with self._lock:
            self._tickets.append(ticket)
            self._release_next()

    def join_if_empty(self, ticket: Ticket) -> bool:
        """Add a ticket if nothing runs or waits; returns whether it was added."""
        with self._lock:
            if self._tickets:
                return False
            self._tickets.append(ticket)
            self._release_next()
            return True

    def _release_next(self) -> None:
        """Release the tickets that may run."""
        for position, ticket in enumerate(islice(self._tickets, self._width)):
            if position == 0 or not ticket.exclusive:
                ticket.release()
            if ticket.exclusive:
                return

    def check_not_inside(self, what: str) -> None:
        """Refuse to wait from inside a callback of a running request, which would wait for its own thread.

        Raises:
            StreamError: this thread runs a request of this queue.
        """
        thread = threading.get_ident()
        with self._lock:
            inside = any(ticket.started and ticket.thread == thread for ticket in self._tickets)
        if inside or is_engine_thread():
            raise StreamError(
                f"{what} was made from inside a callback (on_prefill, a logits processor) of a request that is running "
                "on the same pipeline, and would wait for itself. Return from the callback first, or cancel the stream."
            )

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until it is this thread's turn; the turn ends with the `with` block."""
        ticket = Ticket()
        try:
            self.join(ticket)
            self.start(ticket)
            yield
        finally:
            self.leave(ticket)

    def start(self, ticket: Ticket, seconds: float | None = None) -> bool:
        """Wait for the ticket and start its request in this thread.

        Returns:
            False if the wait was abandoned, or took longer than `seconds`.
        """
        released = ticket.wait(seconds)
        with self._lock:
            ticket.started = released and not ticket.abandoned
            ticket.thread = threading.get_ident()
            return ticket.started

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket, started or not; the next one may run."""
        with self._lock:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self._release_next()
            if not self._tickets and self.on_empty is not None:
                self.on_empty()

    def withdraw(self, ticket: Ticket) -> None:
        """Remove the ticket of a thread that may or may not have started; if it has, it finds its wait abandoned."""
        with self._lock:
            if ticket.started:
                return  # its thread runs, and leaves the queue itself
            ticket.abandoned = True
            self.leave(ticket)  # first: the queue must be left even if Ctrl-C arrives again
            ticket.release()

    def abandon(self, ticket: Ticket) -> None:
        """End the wait of a ticket; no effect once its request has started."""
        with self._lock:
            if ticket.started:
                return
            ticket.abandoned = True
            ticket.release()
