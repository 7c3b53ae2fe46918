"""Paths of the checkout and of the cache, and the hash that names cached files by their inputs.

Standard library only, as everything that the scripts of a checkout share: it runs before anything is installed, on
Linux, macOS and Windows.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

__all__ = ["LOCK", "MODELS", "REQUIREMENTS", "ROOT", "cache_dir", "digest", "new_log"]

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "scripts" / "models"
REQUIREMENTS = ROOT / "scripts" / "requirements"
# All packages of the test environment with versions and hashes; scripts/lock.py writes it.
LOCK = ROOT / "scripts" / "requirements-test.lock"


def cache_dir() -> Path:
    """Return the folder of models, downloads, logs and process locks: ``OV_PHI3_CACHE``, or the user's cache folder."""
    if configured := os.environ.get("OV_PHI3_CACHE"):
        return Path(configured).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ov-phi3"


def new_log(name: str) -> Path:
    """Return an empty log file in the cache."""
    log = cache_dir() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    return log


def digest(*parts: str | bytes | Path) -> str:
    """Return the SHA-256 of texts and file contents, each with its length, so that no two lists of parts collide."""
    total = hashlib.sha256()
    for part in parts:
        # The files are mostly text: a checkout with Windows line ends counts as the same input.
        content = part.read_bytes().replace(b"\r\n", b"\n") if isinstance(part, Path) else part
        content = content.encode() if isinstance(content, str) else content
        total.update(f"{len(content)}:".encode() + content)
    return total.hexdigest()
