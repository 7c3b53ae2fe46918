"""Who may use the engine: one request at a time, or so many, in order of arrival; waiting can be given up.

Ctrl-C can raise in the main thread between any two Python instructions, also inside `threading.Event` and `Condition`,
which are written in Python and would then keep their lock for ever. Only locks that are one C call are used here. And
they are re-entrant: the garbage collector can cancel a dropped stream while its own thread is inside.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from itertools import islice

__all__ = ["Turn", "Turns"]


class Turn:
    """One place in the line; `alone`: with nobody beside it."""

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone
        self._gate = threading.Lock()  # closed until it is this one's turn
        self._gate.acquire()
        self.given_up = False
        self.begun = False

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is this one's turn, or it was given up; False when so many seconds were not enough."""
        return self._gate.acquire(timeout=-1 if seconds is None else max(0.0, min(seconds, threading.TIMEOUT_MAX)))

    def call(self) -> None:
        """Let the waiting thread go."""
        with contextlib.suppress(RuntimeError):  # open already
            self._gate.release()


class Turns:
    """The line in front of one engine; the first `width` in it have their turn. `threading.Lock` promises no order."""

    def __init__(self, width: int = 1) -> None:
        self._width = width
        self._lock = threading.RLock()
        self._line: deque[Turn] = deque()

    def join(self, turn: Turn) -> None:
        """Take the last place."""
        with self._lock:
            self._line.append(turn)
            self._call()

    def _call(self) -> None:
        """Let those go whose turn it is."""
        for place, turn in enumerate(islice(self._line, self._width)):
            if place == 0 or not turn.alone:
                turn.call()
            if turn.alone:
                return

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        """Wait for a turn, and leave at the end."""
        turn = Turn()
        try:
            self.join(turn)
            self.begin(turn)
            yield
        finally:
            self.leave(turn)

    def begin(self, turn: Turn, seconds: float | None = None) -> bool:
        """Wait for the turn and begin it; False when it was given up first, or did not come within so many seconds."""
        came = turn.wait(seconds)
        with self._lock:
            turn.begun = came and not turn.given_up
            return turn.begun

    def leave(self, turn: Turn) -> None:
        """Give the place back, whether it was this one's turn or not; the next in line goes on."""
        with self._lock:
            if turn in self._line:
                self._line.remove(turn)
            self._call()

    def abandon(self, turn: Turn) -> None:
        """Give the place back for a thread that may or may not have started: if it has, it finds its turn given up."""
        with self._lock:
            if turn.begun:
                return  # its thread runs, and leaves the line when the engine is free
            turn.given_up = True
            self.leave(turn)  # first: the line must be left even if Ctrl-C comes once more
            turn.call()

    def give_up(self, turn: Turn) -> None:
        """Stop waiting; no effect on a turn that has begun."""
        with self._lock:
            if turn.begun:
                return
            turn.given_up = True
            turn.call()
