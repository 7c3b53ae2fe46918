"""The threads that produce replies: made here, ended with the interpreter, and absent after a fork."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.engine.channel import Channel

__all__ = ["new_worker_thread"]

_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def new_worker_thread(channel: Channel, work: Callable[[], None], *, name: str = "ov_phi3-stream") -> threading.Thread:
    """A thread for `work`, not started yet, that ends with the interpreter.

    At exit it is cancelled and joined before the engine is torn down. It is a daemon, because the interpreter would
    otherwise wait for the whole reply before it runs any exit handler.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    _channels.add(channel)
    _threads.add(thread)
    return thread


@atexit.register
def _stop_all() -> None:
    for channel in list(_channels):
        channel.cancel()
    for thread in list(_threads):
        if thread.is_alive():
            thread.join()


def _abandon_all() -> None:
    """In a forked process no worker writes to the channels, and their locks may be held for ever."""
    for channel in list(_channels):
        channel.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
