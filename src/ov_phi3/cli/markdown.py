"""Replies rendered as Markdown while they stream, with the package `rich`.

A block of Markdown (a paragraph, a list, a table, code) is final once the next one has begun. Final blocks are printed
and scroll away; only the last block is drawn again as it grows.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.syntax import Syntax

from ov_phi3.cli.terminal import without_controls

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

__all__ = ["Rendered"]

_FRAME_S = 1 / 15
# No part of a reply is left out: HTML is text (the "<int>" of "List<int>" in a sentence), and so are link definitions.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")


class _PlainHeading(Heading):
    """A heading at the left: centred ones are hard to find in a narrow column of text."""

    LEVEL_ALIGN: ClassVar[dict[str, Any]] = {}


class _PlainCode(CodeBlock):
    """Code in the terminal's own colours, and without a margin that would be copied with it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True)


class _Block(Markdown):
    """Markdown whose line ends are line ends, as models mean them, and whose HTML is text."""

    elements: ClassVar[dict[str, Any]] = {
        **Markdown.elements,
        "heading_open": _PlainHeading,
        "fence": _PlainCode,
        "code_block": _PlainCode,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class _Lines:
    """The last lines of a block, without the spaces that fill them up; drawing more than a screen would leave copies.

    Args:
        text: Markdown.
        most: number of lines; None for all.
    """

    def __init__(self, text: str, most: int | None = None) -> None:
        self._block = _Block(text)
        self._most = most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [_stripped(line) for line in console.render_lines(self._block, options, pad=False)]
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        for line in lines if self._most is None else lines[-self._most :]:
            yield from line
            yield Segment.line()


def _stripped(line: list[Segment]) -> list[Segment]:
    """A line without spaces at its end."""
    while line and not line[-1].text.strip(" "):
        line = line[:-1]
    if not line:
        return []
    last = line[-1]
    return [*line[:-1], Segment(last.text.rstrip(" "), last.style, last.control)]


def _blocks(text: str) -> list[str]:
    """The blocks of a Markdown text, each with the empty lines behind it; one at least.

    Rich puts one empty line or several between blocks, so that each is printed by itself.
    """
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    lines = text.split("\n")
    ends = [*starts[1:], len(lines)]
    blocks = ["\n".join(lines[start:end]) for start, end in zip([0, *starts[1:]], ends, strict=True)]
    return [f"{block}\n" for block in blocks[:-1]] + blocks[-1:]


class Rendered:
    """Prints replies as Markdown.

    Args:
        console: where; default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._text = ""  # of the blocks that are not final
        self._printed = False
        self._next_frame = 0.0

    def feed(self, text: str) -> None:
        """Add the next part of a reply, and draw it if the last frame is old enough."""
        self._text += without_controls(text)
        if not self._text.strip() or time.monotonic() < self._next_frame:
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        self._print_final()
        self._live.update(_Lines(self._text, max(1, self._console.height - 2)), refresh=True)
        self._next_frame = time.monotonic() + _FRAME_S

    def end(self) -> None:
        """Print what is left."""
        if self._live is not None:
            self._live.update("")
            self._live.stop()
            self._live = None
        for block in _blocks(self._text):
            self._print(block)
        self._text, self._printed, self._next_frame = "", False, 0.0

    def _print_final(self) -> None:
        """Print the blocks behind which another one has begun, by the lines that are complete."""
        complete = self._text.rfind("\n") + 1
        *final, last = _blocks(self._text[:complete])
        for block in final:
            self._print(block)
        self._text = last + self._text[complete:]

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        if self._printed:
            self._console.print()
        self._console.print(_Lines(text.strip("\n")), end="")
        self._printed = True
