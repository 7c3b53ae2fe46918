"""The temporary directory of an export: its lock, and its rename to the output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hf_models import nothing_left

from ov_phi3.errors import ExportError
from ov_phi3.exporting import workspace
from ov_phi3.model.files import UNFINISHED


def test_abandoned_and_running_exports(tmp_path: Path) -> None:
    target = tmp_path / "o[u]t*"
    abandoned = tmp_path / f".{target.name}.ov_phi3-export-0123"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    other = tmp_path / ".other.ov_phi3-export-0123"
    other.mkdir()
    with workspace.Workspace(target) as running:
        assert not abandoned.exists()
        assert (running.model / UNFINISHED).exists()
        with pytest.raises(ExportError, match="Another export to"):
            workspace.Workspace(target)
        assert running.model.exists()
    nothing_left(tmp_path, other.name)


def test_a_rename_that_fails_puts_the_old_model_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").touch()
    with workspace.Workspace(target) as work:
        shutil.rmtree(work.model)
        with pytest.raises(ExportError, match="cannot be replaced"):
            work.install()
    assert (target / "config.json").exists()
