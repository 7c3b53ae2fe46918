"""Files that the command line keeps for its user: the list of models, and the history of the chat.

They lie in the folder of the environment variable OV_PHI3_STATE, or in the platform's folder for state of programs.
Nothing depends on them: a file that cannot be read or written is as good as none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ov_phi3.files import expanded

__all__ = ["VARIABLE", "history_file", "state_dir", "state_file"]

VARIABLE = "OV_PHI3_STATE"


def state_dir() -> Path:
    """The folder, which need not exist."""
    if configured := os.environ.get(VARIABLE):
        return expanded(configured).absolute()
    home = expanded("~")
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    return base / "ov-phi3"


def state_file(name: str) -> Path | None:
    """A file in the folder, which is made if needed; None if it cannot be. Only the user may read it."""
    try:
        folder = state_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, ValueError):
        return None
    return folder / name


def history_file() -> Path | None:
    """The file with the history, which only its user can read; None if there cannot be one."""
    file = state_file("chat_history")
    if file is not None:
        try:
            file.touch(mode=0o600)
        except OSError:
            return None
    return file
