"""Locks between processes. They belong to the operating system, which releases them at the end of the process."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

from _paths import cache_dir
from _steps import POLL_S, Display

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["lock", "try_lock"]


def try_lock(handle: int) -> bool:
    """Lock an open file exclusively for this process, without waiting."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Allow only one process at a time to build ``name``. The lock ends with its process, so it is never stale."""
    path = cache_dir() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_lock(handle):
            display = Display(f"waiting for another process that builds {name}")
            while not try_lock(handle):
                time.sleep(POLL_S)
                display.tick()
            display.end("free")
        yield
    finally:
        os.close(handle)
