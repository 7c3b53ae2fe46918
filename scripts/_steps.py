"""Commands with progress and a log, and the frame of a script: errors in one line, exit codes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from _paths import ROOT, cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["POLL_S", "BootstrapError", "Display", "child_environment", "main_of", "run_step"]

HEARTBEAT_S = 30.0
POLL_S = 0.2


class BootstrapError(RuntimeError):
    """A failure of a script, with a message of one line that a person can act on."""


class Display:
    """Shows a running step: a line that is redrawn on a terminal, occasional plain lines everywhere else."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = time.monotonic()
        self._live = sys.stdout.isatty()
        self._last_line_at = self.started
        self._width = 0
        if not self._live:
            print(f"- {title} ...", flush=True)

    @property
    def elapsed(self) -> str:
        """Time since the start of the step, for people."""
        return _duration(time.monotonic() - self.started)

    def tick(self, detail: str = "") -> None:
        """Show that the step is running, with its latest output."""
        now = time.monotonic()
        if self._live:
            spinner = "|/-\\"[int((now - self.started) / POLL_S) % 4]
            self._draw(f"{spinner} {self.title} ({self.elapsed}) {detail}")
        elif now - self._last_line_at >= HEARTBEAT_S:
            self._last_line_at = now
            print(f"  still running: {self.title} ({self.elapsed})", flush=True)

    def end(self, outcome: str) -> None:
        """Replace the live line by the outcome."""
        line = f"- {self.title}: {outcome}, {self.elapsed}"
        if self._live:
            self._draw(line)
            print(flush=True)
        else:
            print(line, flush=True)

    def _draw(self, line: str) -> None:
        line = line[: shutil.get_terminal_size().columns - 1].encode("ascii", "replace").decode()
        print("\r" + line.ljust(self._width), end="", flush=True)
        self._width = len(line)


def child_environment() -> dict[str, str]:
    """Return the environment for child processes: without the caller's Python settings, with UTF-8 everywhere."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return env | {
        "PYTHONUTF8": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "OV_PHI3_CACHE": str(cache_dir()),
    }


def run_step(
    title: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a command with progress and write its output to ``log``.

    Raises:
        BootstrapError: The command failed; the message has the last line of its output.
    """
    display = Display(title)
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(part) for part in command]
    with log.open("ab") as out:
        out.write(f"\n$ {subprocess.list2cmdline(arguments)}\n".encode())
        out.flush()
        try:
            process = subprocess.Popen(
                arguments,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env={**child_environment(), **(variables or {})},
            )
        except OSError as error:
            raise BootstrapError(f"{title}: cannot start {arguments[0]}: {error.strerror}") from None
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                display.tick(_last_line(log))
        finally:
            if process.poll() is None:  # Ctrl-C: the child does not outlive this process
                process.kill()
                process.wait()
    if process.returncode != 0:
        display.end("FAILED")
        raise BootstrapError(f"{title} failed (exit code {process.returncode}): {_last_line(log)} -- log: {log}")
    display.end("done")


def main_of(function: Callable[[], int]) -> None:
    """Run a script's main function and exit with its code; a `BootstrapError` is one line on stderr, no traceback."""
    try:
        code = function()
    except BootstrapError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("\ninterrupted; finished steps are kept, run the same command again to continue", file=sys.stderr)
        code = 130
    sys.exit(code)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _last_line(log: Path, size: int = 4096) -> str:
    """Return the last non-empty line of a log; progress bars separate their lines by carriage returns."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
