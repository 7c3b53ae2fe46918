"""A program in a pseudo-terminal, as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

__all__ = ["WITHOUT_EXTRA", "Terminal"]

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]")
_POSITION = b"\x1b[6n"
WITHOUT_EXTRA = "import sys; sys.modules['prompt_toolkit'] = sys.modules['rich'] = None; from ov_phi3.cli import main; "
"""Python code for `Terminal(code=...)`: the command line without the packages of the extra "cli"."""


class Terminal:
    """A program in a pseudo-terminal.

    Text that wraps is torn apart: wait for short texts only.

    Args:
        argv: the arguments of `ov-phi3`.
        columns: width of the terminal.
        code: Python code that has imported `main`, in place of the program.
        variables: environment variables.

    Attributes:
        seen: what it has printed since the last text that was waited for, without escape sequences.
        raw: everything it has printed.
    """

    def __init__(self, argv: list[str], *, columns: int = 80, code: str = "", **variables: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # Without COLUMNS and LINES: the size below counts, not that of the shell that runs the tests.
            inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            environment = {**inherited, "TERM": "xterm-256color", **variables}
            command = ["-c", f"{code}sys.exit(main(sys.argv[1:]))"] if code else ["-m", "ov_phi3"]
            os.execve(sys.executable, [sys.executable, *command, *argv], environment)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.seen = self.raw = ""
        self.ended = False

    def until(self, text: str, timeout: float = 60, *, again: str = "") -> None:
        """Read until the text appears; type `again` after every second without new output."""
        end = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not appear; seen: {self.seen!r}"
            before = len(self.seen)
            assert self._read(), f"it ended without {text!r}; seen: {self.seen!r}"
            if again and len(self.seen) == before:
                self.type(again)
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def _read(self) -> bool:
        """Read new output, waiting a second for it; False once the program has closed its end."""
        if not select.select([self.fd], [], [], 1)[0]:
            return True
        try:
            new = os.read(self.fd, 4096)
        except OSError:
            return False
        if _POSITION in new:  # a real terminal answers where its cursor is
            os.write(self.fd, b"\x1b[24;1R")
        text = new.decode("utf-8", "replace")
        self.raw += text
        self.seen = _ESCAPES.sub("", self.seen + text)
        return bool(new)

    def type(self, text: str) -> None:
        """Type a text; Enter is a carriage return."""
        os.write(self.fd, text.encode())

    def paste(self, text: str) -> None:
        """Paste a text, as a terminal with bracketed paste does."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def exit_code(self, timeout: float = 60) -> int:
        """Wait for the end."""
        end = time.monotonic() + timeout
        while self._read():
            assert time.monotonic() < end, f"it did not end; seen: {self.seen!r}"
        self.ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """End the program."""
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
