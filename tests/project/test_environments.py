"""Environments of the scripts: made once, made again when an input changes, never over foreign folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import _environments
import _steps


def test_an_environment_is_current_until_an_input_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "one.txt").write_text("a==1\n")
    monkeypatch.setattr(_environments, "REQUIREMENTS", requirements)
    venv = tmp_path / "venv"
    venv.mkdir()
    stamp = _environments.environment_stamp(venv, ["one"])
    assert not _environments.is_current(venv, stamp, works=lambda _: True)  # incomplete: no stamp yet
    (venv / _environments.STAMP).write_text(stamp)
    assert _environments.is_current(venv, stamp, works=lambda _: True)
    assert not _environments.is_current(venv, stamp, works=lambda _: False)  # broken
    assert not _environments.is_current(venv, stamp)  # broken, for real: there is no interpreter
    (requirements / "one.txt").write_text("a==2\n")
    assert _environments.environment_stamp(venv, ["one"]) != stamp


@pytest.fixture
def fake_install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make environments without packages; the list holds the titles of the steps that ran."""
    steps: list[str] = []

    def step(title: str, command: list[Any], log: Path, **_: Any) -> None:
        steps.append(title)
        if "venv" in command:
            python = _environments.venv_python(Path(command[-1]))
            python.parent.mkdir()
            python.write_text("")

    monkeypatch.setattr(_environments, "run_step", step)
    monkeypatch.setattr(_environments, "starts", lambda venv: _environments.venv_python(venv).exists())
    return steps


def test_an_environment_is_made_once_and_again_when_its_stamp_differs(
    tmp_path: Path, cache: Path, fake_install: list[str]
):
    venv = tmp_path / "with a space" / "venv"
    _environments.ensure_environment(venv, ["export"])
    torch, library, exporter = fake_install[-3:]
    assert (torch, exporter) == ("install torch", "install the exporter")
    assert "ov-phi3" in library
    fake_install.clear()
    _environments.ensure_environment(venv, ["export"])
    assert fake_install == []
    (venv / "left over").write_text("")
    (venv / _environments.STAMP).write_text("of another time")
    _environments.ensure_environment(venv, ["export"])
    assert len(fake_install) == 4
    assert not (venv / "left over").exists()


def test_the_environment_of_a_peer_does_not_depend_on_the_checkout(
    tmp_path: Path, cache: Path, fake_install: list[str], monkeypatch: pytest.MonkeyPatch
):
    python = tmp_path / "python"
    (_, command), *others = _environments.install_commands(python, ["peer-llama-cpp"], library=False)
    assert "-e" not in command
    assert others == []
    before = _environments.environment_stamp(tmp_path, ["peer-llama-cpp"], library=False)
    monkeypatch.setattr(_environments, "ROOT", tmp_path)  # another clone, with the same requirements
    assert _environments.environment_stamp(tmp_path, ["peer-llama-cpp"], library=False) == before


def test_a_foreign_folder_is_not_removed(tmp_path: Path, cache: Path, fake_install: list[str]):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "precious").write_text("mine")
    with pytest.raises(_steps.BootstrapError, match="not made by this script"):
        _environments.ensure_environment(tmp_path / "venv", ["export"])
    assert (tmp_path / "venv" / "precious").read_text() == "mine"


def test_a_wheel_replaces_the_source_tree_without_an_index(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    (_, build), (_, install) = _environments.wheel_commands(python, None, tmp_path)
    assert build[-1] == _environments.ROOT
    assert "--no-index" in build
    assert "-e" not in install
    assert {"--no-index", "--force-reinstall", tmp_path} <= {*install}
    (only,) = _environments.wheel_commands(python, tmp_path / "dist", tmp_path)
    assert tmp_path / "dist" in only[1]  # a wheel that was built elsewhere is not built again
