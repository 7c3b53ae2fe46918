"""Subprocesses that do the heavy work: their output is passed on as it comes, and none outlives its parent."""

from __future__ import annotations

import codecs
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ov_phi3.errors import ExportError

__all__ = ["Progress", "ProgressLine", "bootstrap", "child_environment", "run"]

_TAIL = 30
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")

# The child watches its standard input, whose other end only the parent holds: when the parent is gone, however it went,
# the child removes the unfinished directory and exits. The working directory is taken off sys.path, where "-c" puts it,
# so that a folder called `datasets` or `optimum` where the user happens to be is not imported.
_BOOTSTRAP = """
import os, sys, threading
sys.path[:] = [path for path in sys.path if path]
def watch():
    try:
        while os.read(0, 1): pass
    finally:
        import shutil
        shutil.rmtree({remove!r}, ignore_errors=True)
        os._exit(130)
threading.Thread(target=watch, daemon=True).start()
{code}
"""


class ProgressLine(str):
    """A line of progress; print it like any string.

    Attributes:
        transient: a progress bar's state, to be overwritten by the next line (it ended in a carriage return).
        ours: said by this library, rather than passed on from optimum-cli.
    """

    __slots__ = ("ours", "transient")

    transient: bool
    ours: bool

    def __new__(cls, text: str, *, transient: bool = False, ours: bool = False) -> ProgressLine:
        """A line without its end."""
        line = super().__new__(cls, text)
        line.transient, line.ours = transient, ours
        return line


Progress = Callable[[ProgressLine], object]


def bootstrap(code: str, remove: Path) -> list[str]:
    """The command that runs Python code in a child which removes a directory when its parent dies."""
    return [sys.executable, "-c", _BOOTSTRAP.format(remove=str(remove), code=code)]


def child_environment(scratch: Path) -> dict[str, str]:
    """The environment of this process with telemetry off, UTF-8 on, and temporary files kept in a directory of ours.

    optimum-cli writes the unquantised model to the temporary directory before it quantises: gigabytes that must go away
    with a killed export, and that should lie on the disk of the output. openvino-telemetry is silent where CI is set.
    """
    ours = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "CI": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)),
    }
    return {**os.environ, **ours}


def run(command: Sequence[str], environment: Mapping[str, str], progress: Progress) -> tuple[int, list[str]]:
    """Run a command to its end, handing on each line it writes.

    The child does not get the terminal's Ctrl-C; this process does, and kills it. Whatever ends this call, an exception
    of `progress` included, the child has ended before.

    Returns:
        its exit code, negative for a signal, and the last lines of its output.

    Raises:
        ExportError: the command cannot be started.
    """
    group: dict[str, Any] = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **group,
        )
    except OSError as error:
        raise ExportError(f"{command[0]} cannot be started: {error.strerror or error}.") from error
    tail: deque[str] = deque(maxlen=_TAIL)
    lines: queue.SimpleQueue[ProgressLine | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), name="ov-phi3-export-output", daemon=True)
    try:
        reader.start()
        while (line := _next(lines)) is not None:
            if not line.transient and line.strip():
                tail.append(str(line))
            progress(line)
        return process.wait(), list(tail)
    finally:
        _end(process)
        reader.join(5)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _next(lines: queue.SimpleQueue[ProgressLine | None]) -> ProgressLine | None:
    while True:  # in slices: on Windows a wait without a timeout swallows Ctrl-C
        with suppress(queue.Empty):
            return lines.get(timeout=0.2)


def _read(stream: object, lines: queue.SimpleQueue[ProgressLine | None]) -> None:
    """Split output into lines; a carriage return ends a line as well, that of a progress bar."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    try:
        fd = stream.fileno()  # type: ignore[attr-defined]
        while data := os.read(fd, 65536):
            rest += decoder.decode(data)
            end = 0
            for match in _LINE.finditer(rest):
                if match[0].endswith("\r") and match.end() == len(rest):
                    break  # the other half of "\r\n" may be on its way
                _put(lines, match[0])
                end = match.end()
            rest = rest[end:]
    except (OSError, ValueError):
        pass
    finally:
        if rest:
            _put(lines, rest)
        lines.put(None)


def _put(lines: queue.SimpleQueue[ProgressLine | None], text: str) -> None:
    transient = text.endswith("\r")
    clean = _ANSI.sub("", text.rstrip("\r\n")).rstrip()
    if clean:
        lines.put(ProgressLine(clean, transient=transient))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    with suppress(OSError):
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
