"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` replaced; one that names an unknown user stays as it is, and is then said not to exist."""
    plain = Path(path)
    try:
        return plain.expanduser()
    except RuntimeError:
        return plain
