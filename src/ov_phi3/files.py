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

__all__ = ["FileLock", "expanded", "lock_file", "text_or_empty", "write_atomically"]


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


def lock_file(path: Path, *, wait: bool = False) -> FileLock:
    """Lock a file, which is created if needed, until the lock is closed or this process ends.

    The lock excludes other processes, and other calls in this process.

    Args:
        path: the file.
        wait: wait until the lock is free, instead of raising.

    Raises:
        OSError: the file cannot be opened or locked, or is locked already.
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
    return FileLock(file)


class FileLock:
    """A locked file, see `lock_file`; a context manager that unlocks at its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def close(self) -> None:
        """Unlock the file."""
        if self._file.closed:
            return
        with self._file:
            if os.name != "nt":
                import fcntl

                # Closing would not unlock a file that a process forked in the meantime has open too.
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
