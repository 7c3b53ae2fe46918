"""A reply on the terminal: its text while it streams, and the line about it at the end."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING, Protocol

from ov_phi3.bench.table import table
from ov_phi3.cli import terminal

if TYPE_CHECKING:
    from ov_phi3.cli.terminal import PrefillBar
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.generation.results import GenerationResult, TokenLogprob

__all__ = ["Plain", "Printer", "Wrapped", "describe", "print_logprobs", "printer", "show"]

_ENDINGS = {
    "length": "; ended at its length limit",
    "cancelled": "; stopped",
    "timeout": "; ended by its time limit",
    "loop": "; ended in a loop",
}


class Printer(Protocol):
    """Prints one reply after another, in parts."""

    def feed(self, text: str) -> None:
        """Print the next part of a reply."""
        ...

    def end(self) -> None:
        """Print the end of the reply."""
        ...


class Plain:
    """The text as it comes: for files, pipes and programs."""

    def feed(self, text: str) -> None:
        """Print the next part of a reply."""
        print(text, end="", flush=True)

    def end(self) -> None:
        """End the line."""
        print(flush=True)


class Wrapped:
    """The text on a terminal, with line ends between words instead of inside them.

    Args:
        width: columns of the terminal; default: as it is when a word is printed.
    """

    def __init__(self, width: int | None = None) -> None:
        self._width = width
        self._column = 0
        self._space = ""  # behind the last word
        self._word = ""  # of which more may come

    def feed(self, text: str) -> None:
        """Print the words that are complete."""
        for part in re.split(r"(\s+)", terminal.without_controls(text)):
            if not part:
                continue
            if part.isspace():
                self._put_word()
                *lines, self._space = (self._space + part).split("\n")
                if lines:
                    print("\n" * len(lines), end="")
                    self._column = 0
            else:
                self._word += part
                if _columns(self._word) >= self._most:  # longer than a line, so that no place is better than another
                    self._put_word()
        sys.stdout.flush()

    def end(self) -> None:
        """Print the last word, and end the line."""
        self._put_word()
        print(flush=True)
        self._column, self._space = 0, ""

    @property
    def _most(self) -> int:
        return self._width or shutil.get_terminal_size().columns

    def _put_word(self) -> None:
        if not self._word:
            return
        needed = _columns(self._space) + _columns(self._word)
        # Without a space it goes on with a word whose beginning was longer than a line.
        if self._column and self._space and self._column + needed > self._most:
            print()
            self._column, self._space = 0, ""
        print(self._space + self._word, end="")
        self._column += _columns(self._space) + _columns(self._word)
        self._space, self._word = "", ""


def _columns(text: str) -> int:
    """Columns that a text takes on a terminal: East Asian wide characters take two, combining ones none."""
    text = text.expandtabs(4)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def printer(*, plain: bool = False) -> Printer:
    """The printer for this standard output.

    Args:
        plain: no Markdown, even on a terminal.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return Plain()
    if not plain and not terminal.is_dumb():
        try:
            from ov_phi3.cli.markdown import Rendered
        except ImportError:  # the extra "cli" is not installed
            return Wrapped()
        return Rendered()
    return Wrapped()


def show(stream: TokenStream, bar: PrefillBar, printer: Printer | None = None) -> tuple[GenerationResult, bool]:
    """Print a reply while it streams; return the result and whether Ctrl-C stopped it."""
    interrupted, printer = False, printer or Plain()
    with stream:
        try:
            for chunk in stream:
                printer.feed(chunk.text)
        except KeyboardInterrupt:
            interrupted = True
            stream.cancel()
        finally:
            bar.clear()
            printer.end()
        return stream.result, interrupted


def describe(result: GenerationResult) -> str:
    """The line about a reply: its latency, and why it ended unless it came to an end by itself."""
    return f"[{result.metrics}{_ENDINGS.get(result.finish_reason, '')}]"


def print_logprobs(logprobs: list[TokenLogprob]) -> None:
    """Print a table of a reply: each token, its probability, and the most likely tokens at its position."""
    rows = [("token", "logprob", "probability", "most likely")]
    for entry in logprobs:
        likely = "  ".join(f"{_shown(top)} {math.exp(top.logprob):.1%}" for top in entry.candidates)
        rows.append((_shown(entry), f"{entry.logprob:.3f}", f"{math.exp(entry.logprob):.1%}", likely))
    print()
    print(table(rows))


def _shown(entry: TokenLogprob) -> str:
    """A token as it can be told from others: quoted, with line ends and spaces visible."""
    return json.dumps(entry.text, ensure_ascii=False)
