"""The pages of the documentation and their fenced blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language, its text, the reason why it is not run, its output."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    output: str | None

    @property
    def location(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL
)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; a ```text block directly after a ```python block is the output of that block."""
    source = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(source))
    out = []
    for at, match in enumerate(fences):
        follower = fences[at + 1] if at + 1 < len(fences) else None
        is_output = (
            follower is not None
            and follower["language"] == "text"
            and not source[match.end() : follower.start()].strip()
            and match["language"] == "python"
        )
        reason = _NOT_RUN.search(source, 0, match.start())
        indent = len(match["indent"])
        text = "".join(line[indent:] if line.strip() else line for line in match["text"].splitlines(keepends=True))
        out.append(
            Block(
                page=page,
                line=source.count("\n", 0, match.start("text")) + 1,
                language=match["language"],
                text=text,
                not_run=reason[1] if reason else None,
                output=follower["text"] if is_output and follower is not None else None,
            )
        )
    return out


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]
