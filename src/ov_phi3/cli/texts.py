"""Texts from arguments, files and standard input, without what is no part of a text.

A byte order mark, Windows line ends and the last newline come from the editor or the shell, and every one of them would
reach the model. Only a text with control tokens keeps its last newline: chat templates end in one.
"""

from __future__ import annotations

import codecs
import os
import stat
import sys
from pathlib import Path

from ov_phi3.cli import terminal
from ov_phi3.errors import ConfigError
from ov_phi3.files import expanded

__all__ = ["STDIN", "StandardInput", "at_file", "checked_argument", "read_text"]

STDIN = "-"
# A byte order mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class StandardInput:
    """Standard input, which can be read once.

    Raises:
        ConfigError: it is read twice, or is not text.
    """

    def __init__(self) -> None:
        self._read = False

    @property
    def is_terminal(self) -> bool:
        """Whether a person would have to type it."""
        return sys.stdin is not None and sys.stdin.isatty()

    @property
    def is_fed(self) -> bool:
        """Whether a pipe or a file stands behind it. Not so for /dev/null, a terminal, or a service's socket."""
        try:
            mode = os.fstat(sys.stdin.fileno()).st_mode
        except (AttributeError, OSError, ValueError):  # closed, or replaced by an object without a file
            return False
        return not self._read and (stat.S_ISFIFO(mode) or stat.S_ISREG(mode))

    def read(self, *, exact: bool = False) -> str:
        """All of it, decoded and cleaned; `exact` keeps the last newline."""
        if self._read:
            raise ConfigError("standard input is asked for twice; it can be read once.")
        self._read = True
        if sys.stdin is None:
            return ""
        with terminal.status_line() as show:
            show("Reading standard input ...")
            source = getattr(sys.stdin, "buffer", sys.stdin)
            return _decode(source.read(), "standard input", exact)


def read_text(path: str | Path, stdin: StandardInput, *, exact: bool = False) -> str:
    """The text of a file; "-" is standard input; `exact` keeps the last newline.

    Raises:
        ConfigError: it cannot be read, or is not text.
    """
    if str(path) == STDIN:
        return stdin.read(exact=exact)
    try:
        return _decode(expanded(path).read_bytes(), str(path), exact)
    except (OSError, ValueError) as exc:  # ValueError: a null character in the path
        if isinstance(exc, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read: {getattr(exc, 'strerror', None) or exc}.") from exc


def at_file(value: str) -> str:
    """The value of a flag, or the text of a file if it is `@FILE`.

    Raises:
        ConfigError: the file cannot be read.
    """
    return read_text(value[1:], StandardInput()) if value.startswith("@") else value


def checked_argument(name: str, text: str) -> str:
    """A text from the command line, which is checked to be valid Unicode.

    Raises:
        ConfigError: it has bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{name} is not valid UTF-8 at character {exc.start + 1}; {_CONVERT}") from exc
    return text


_CONVERT = "convert it, for instance with `iconv -f latin1 -t utf-8`."


def _decode(data: bytes | str, name: str, exact: bool) -> str:
    if isinstance(data, str):
        text = data.removeprefix("\ufeff")
    else:
        mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
        try:
            text = data[len(mark) :].decode(encoding)
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{name} is not valid {encoding.upper()} at byte {exc.start + 1}; {_CONVERT}") from exc
    text = text.replace("\r\n", "\n")
    return text if exact else text.removesuffix("\n")
