"""Who may use the engine: one request at a time, in order of arrival, and waiting can be given up."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Turn", "Turns"]


class Turn:
    """One place in the line."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self.given_up = False

    def wait(self) -> bool:
        """Wait until it is this one's turn; False when it was given up first."""
        self._ready.wait()
        return not self.given_up

    def call(self) -> None:
        """Let the waiting thread go."""
        self._ready.set()


class Turns:
    """The line in front of one engine. `threading.Lock` makes no promise about order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: deque[Turn] = deque()

    def join(self) -> Turn:
        """Take the last place."""
        turn = Turn()
        with self._lock:
            self._line.append(turn)
            if self._line[0] is turn:
                turn.call()
        return turn

    def leave(self, turn: Turn) -> None:
        """Give the place back, whether it was this one's turn or not; the next in line goes on."""
        with self._lock:
            if turn in self._line:
                self._line.remove(turn)
            if self._line:
                self._line[0].call()

    def give_up(self, turn: Turn) -> None:
        """Stop waiting; no effect on a turn that has begun."""
        with self._lock:
            if self._line and self._line[0] is turn:
                return
            turn.given_up = True
        turn.call()
