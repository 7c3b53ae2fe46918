"""Subprocesses for the heavy work. Their output is passed on line by line, and none outlives its parent."""

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

# The child reads its standard input, whose other end only the parent holds. When the parent ends, for whatever reason,
# the child removes the unfinished directory and exits. "-c" puts the working directory on sys.path; it is removed, so
# that a folder called `datasets` or `optimum` in it is not imported.
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
        transient: whether the next line overwrites it, as in a progress bar (it ended in a carriage return).
        ours: whether the line is from this library, rather than from optimum-cli.
    """

    __slots__ = ("ours", "transient")

    transient: bool
    ours: bool

    def __new__(cls, text: str, *, transient: bool = False, ours: bool = False) -> ProgressLine:
        """A line without its line end."""
        line = super().__new__(cls, text)
        line.transient, line.ours = transient, ours
        return line


Progress = Callable[[ProgressLine], object]


def bootstrap(code: str, remove: Path) -> list[str]:
    """A command that runs Python code in a child process, which removes a directory if its parent dies."""
    return [sys.executable, "-c", _BOOTSTRAP.format(remove=str(remove), code=code)]


def child_environment(scratch: Path) -> dict[str, str]:
    """The environment of this process, with telemetry off, UTF-8 on, and temporary files in the scratch directory.

    optimum-cli writes the unquantised model, gigabytes, to the temporary directory before it quantises. These files
    have to be on the output's disk, and be removed with a killed export. CI=true turns openvino-telemetry off.
    """
    changes = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "CI": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)),
    }
    return {**os.environ, **changes}


def run(command: Sequence[str], environment: Mapping[str, str], progress: Progress) -> tuple[int, list[str]]:
    """Run a command to its end, and pass each line of its output to `progress`.

    The terminal's Ctrl-C reaches only this process, which then kills the child. The child has always ended when this
    function returns or raises, also if `progress` raises.

    Returns:
        The exit code, negative for a signal, and the last lines of the output.

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
    while True:  # with a timeout, because on Windows a wait without one ignores Ctrl-C
        with suppress(queue.Empty):
            return lines.get(timeout=0.2)


def _read(stream: object, lines: queue.SimpleQueue[ProgressLine | None]) -> None:
    """Split output into lines. A carriage return ends a line too, as in a progress bar."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    try:
        fd = stream.fileno()  # type: ignore[attr-defined]
        while data := os.read(fd, 65536):
            rest += decoder.decode(data)
            end = 0
            for match in _LINE.finditer(rest):
                if match[0].endswith("\r") and match.end() == len(rest):
                    break  # the "\n" of "\r\n" may follow
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
