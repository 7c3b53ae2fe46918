"""What a person types: messages of one line or several, edited, with a history that outlives the chat."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from ov_phi3.cli import terminal
from ov_phi3.cli.commands import LEAVES, PROMPT
from ov_phi3.cli.state import history_file
from ov_phi3.cli.texts import checked_argument
from ov_phi3.errors import ConfigError

if TYPE_CHECKING:
    from ov_phi3.cli.commands import Completions

__all__ = ["MESSAGES", "Reader", "keyboard_off", "reader"]

CONTINUED = "... "
QUOTES = '"""'
MESSAGES = f"{QUOTES} begins and ends a message of several lines."


class Reader(Protocol):
    """Reads one message after another."""

    help: str

    def read(self) -> str | None:
        """The next message; None at the end of the input."""
        ...


def reader(completions: Completions) -> Reader:
    """The reader for this standard input: a terminal with or without `prompt_toolkit`, or a pipe.

    Args:
        completions: what can be completed.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        return Lines(lambda _: _next_line())
    if sys.stdout.isatty() and not terminal.is_dumb():
        try:
            from ov_phi3.cli.editor import Editor
        except ImportError:  # the extra "cli" is not installed
            pass
        else:
            return Editor(completions)
    return Lines(_input(), interactive=True)


class Lines:
    """Messages of one line each, or of several lines between triple quotes.

    Args:
        ask: returns the next line after showing a prompt. Raises EOFError at the end.
        interactive: a person types them.
    """

    help = MESSAGES

    def __init__(self, ask: Callable[[str], str], *, interactive: bool = False) -> None:
        self._ask = ask
        self._interactive = interactive

    def read(self) -> str | None:
        """The next message; Ctrl-C drops what was typed."""
        while True:
            try:
                return self._message()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print(file=sys.stderr)
                terminal.note(LEAVES)
            except EOFError:
                if self._interactive:
                    print(file=sys.stderr)
                return None

    def _message(self) -> str:
        text = self._ask(PROMPT)
        if not text.lstrip().startswith(QUOTES):
            return text
        text = text.lstrip().removeprefix(QUOTES)
        lines = []
        while not text.rstrip().endswith(QUOTES):
            lines.append(text)
            text = self._ask(CONTINUED)
        lines.append(text.rstrip().removesuffix(QUOTES))
        return "\n".join(lines).strip("\n")


def _next_line() -> str:
    """The next line of a pipe or a file.

    Raises:
        EOFError: there is none.
        ConfigError: it is not text.
    """
    try:
        line = sys.stdin.readline() if sys.stdin else ""
    except UnicodeDecodeError as exc:
        raise ConfigError(f"standard input is not valid {exc.encoding.upper()}: {exc.reason}.") from exc
    if not line:
        raise EOFError
    checked_argument("standard input", line)  # where the locale is not UTF-8, Python lets other bytes through
    return line.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def _input() -> Callable[[str], str]:
    """`input`, with line editing, history and pasted text in one message where the `readline` module is there."""
    if not sys.stdout.isatty():

        def ask(prompt: str) -> str:
            print(prompt, end="", file=sys.stderr, flush=True)  # standard output holds the replies
            return input()

        return ask
    try:
        import readline
    except ImportError:
        return input
    readline.parse_and_bind("set enable-bracketed-paste on")
    if (file := history_file()) is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(file.with_suffix(".lines"))

    def remember(prompt: str) -> str:
        text = input(prompt)
        if file is not None:
            with contextlib.suppress(OSError):
                readline.write_history_file(file.with_suffix(".lines"))
        return text

    return remember


@contextlib.contextmanager
def keyboard_off() -> Iterator[None]:
    """Show nothing that is typed meanwhile, which would be mixed with the reply; it waits for the next prompt.

    On Windows nothing is shown while nobody reads.
    """
    if sys.stdin is None or not sys.stdin.isatty() or os.name == "nt":
        yield
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = [*before]
    silent[0] &= ~termios.ICRNL  # Enter stays Enter for the editor, which takes a line feed for Ctrl-J
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
