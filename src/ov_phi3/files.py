"""Paths and files: `~` in a path, optional text files, atomic writes, and locks."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["expanded", "lock_file", "text_or_empty", "write_atomically"]


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` replaced. A path of an unknown user stays as it is; opening it then fails as "does not exist".

    Raises:
        TypeError: `path` is not a path.
    """
    plain = Path(path)
    try:
        return plain.expanduser()
    except RuntimeError:
        return plain


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that takes the name `path` only when the `with` block ends without an exception.

    The data goes to a hidden file beside `path`, is flushed to the disk, and is then renamed. An existing file stays
    unchanged until then. After an exception the hidden file is removed.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def text_or_empty(path: Path) -> str:
    """The UTF-8 text of a file, with invalid bytes replaced; '' if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def lock_file(path: Path, *, wait: bool = False) -> IO[bytes]:
    """Open a file, creating it if needed, and lock it until it is closed or this process ends.

    The lock excludes other processes, and other calls in this process.

    Args:
        path: the file.
        wait: wait until no other process holds the lock, instead of raising.

    Raises:
        OSError: the file cannot be opened or locked, or is locked by another process.
    """
    file = path.open("ab")
    try:
        if os.name == "nt":
            _lock_on_windows(file, wait=wait)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file


def _lock_on_windows(file: IO[bytes], *, wait: bool) -> None:
    import msvcrt

    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError as error:
            if not wait or error.errno not in (errno.EACCES, errno.EDEADLK):
                raise
            time.sleep(0.1)
        else:
            return
