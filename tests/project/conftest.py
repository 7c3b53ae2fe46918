"""Shared by the tests of `scripts/`: a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the scripts, which need not exist."""
    monkeypatch.setenv("OV_PHI3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
