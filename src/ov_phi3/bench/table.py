"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Align rows in columns; the first row is the header, and columns of numbers are right-aligned."""
    lines = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    numeric = [len(lines) > 1 and all(_is_number(row[i]) for row in lines[1:]) for i in range(len(widths))]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in lines
    )


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("%", "", 1).isdigit() or text == "-"
