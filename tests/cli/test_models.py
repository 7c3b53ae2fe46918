"""`ov-phi3 models`, and models called by a name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ov_phi3.cli import main
from ov_phi3.cli.model_list import KnownModel, known_models, remember
from ov_phi3.cli.state import state_dir
from ov_phi3.model.info import ModelInfo

Captured = pytest.CaptureFixture[str]
HUB = "microsoft/Phi-3-mini-4k-instruct"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the list."""
    monkeypatch.setenv("OV_PHI3_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def exported(demo_int4: Path, directory: Path, *, source: str = HUB, recipe: str = "int4") -> ModelInfo:
    """A copy of the demo model that says where it comes from; in the list."""
    shutil.copytree(demo_int4, directory)
    manifest = json.loads((directory / "ov_phi3.json").read_text(encoding="utf-8"))
    (directory / "ov_phi3.json").write_text(json.dumps({**manifest, "source": source, "recipe": recipe}))
    info = ModelInfo.from_dir(directory)
    remember(info)
    return info


@pytest.mark.parametrize(
    "name",
    [
        HUB,
        HUB.lower(),
        "Phi-3-mini-4k-instruct",
        "phi-3-mini-4k-instruct-int4",
        "microsoft/phi-3-mini-4k-instruct-int4",
        "mine",
    ],
)
def test_a_model_is_found_by_its_names(demo_int4: Path, tmp_path: Path, device: str, name: str) -> None:
    exported(demo_int4, tmp_path / "models" / "mine")
    command = ["generate", name, "Hi", "--device", device, "--quiet", "--max-new-tokens", "1"]
    assert main(command) == 0


def test_a_directory_comes_before_a_name(
    demo_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    exported(demo_int4, tmp_path / "models" / "mine")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "mine", "Hi"]) == 1
    assert "mine holds no files" in capsys.readouterr().err


def test_a_name_of_several_models_lists_them(demo_int4: Path, tmp_path: Path, capsys: Captured) -> None:
    exported(demo_int4, tmp_path / "a")
    exported(demo_int4, tmp_path / "b", recipe="int8")
    assert main(["generate", HUB, "Hi"]) == 1
    err = capsys.readouterr().err
    assert "is the name of 2 models" in err
    assert f"phi-3-mini-4k-instruct-int8 ({tmp_path}/b)" in err


def test_an_unknown_name_says_how_to_export(demo_int4: Path, tmp_path: Path, capsys: Captured) -> None:
    exported(demo_int4, tmp_path / "a")
    assert main(["generate", "phi-3-mini-4k-instrct", "Hi"]) == 1
    err = capsys.readouterr().err
    assert "Did you mean 'phi-3-mini-4k-instruct'?" in err
    assert "ov-phi3 export" in err
    assert main(["chat", "microsoft/Phi-3.5-mini-instruct"]) == 1
    assert "ov-phi3 export microsoft/Phi-3.5-mini-instruct DIRECTORY" in capsys.readouterr().err


def test_models_are_listed_as_text_and_json(demo_int4: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["models"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "ov-phi3 export" in err
    exported(demo_int4, tmp_path / "a")
    exported(demo_int4, tmp_path / "gone", recipe="int8")
    shutil.rmtree(tmp_path / "gone")
    assert main(["models"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "SIZE", "CONTEXT", "SOURCE", "DIRECTORY"]
    assert row.split()[0] == "phi-3-mini-4k-instruct-int4"
    assert row.endswith(str(tmp_path / "a"))
    assert main(["models", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["source"] == HUB
    assert report["context_length"] == ModelInfo.from_dir(demo_int4).context_length
    (tmp_path / "a" / "config.json").unlink()
    assert main(["models"]) == 0
    assert "is left out" in capsys.readouterr().err


def test_an_export_and_a_load_are_remembered_once(
    demo_int4: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = ModelInfo.from_dir(demo_int4)
    monkeypatch.setattr("ov_phi3.export", lambda *_, **__: info)
    assert main(["export", "somewhere", str(tmp_path / "out")]) == 0
    before = (state_dir() / "models.json").read_bytes()
    assert [model.path for model in known_models()] == [str(demo_int4)]
    assert main(["generate", str(demo_int4), "Hi", "--device", device, "--max-new-tokens", "1"]) == 0
    assert (state_dir() / "models.json").read_bytes() == before
    (state_dir() / "models.json").unlink()
    assert main(["generate", str(demo_int4), "Hi", "--device", device, "--max-new-tokens", "1"]) == 0
    assert (state_dir() / "models.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[1]", "[{}]", '{"name": 1}', "\xff"])
def test_a_damaged_list_is_written_anew(demo_int4: Path, tmp_path: Path, folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "models.json").write_bytes(content.encode("latin1"))
    assert known_models() == []
    exported(demo_int4, tmp_path / "a")
    assert [Path(model.path).name for model in known_models()] == ["a"]


def test_a_folder_that_cannot_be_written_is_no_error(
    demo_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OV_PHI3_STATE", str(tmp_path / "file" / "below"))
    exported(demo_int4, tmp_path / "a")
    assert known_models() == []


@pytest.mark.parametrize(
    ("directory", "manifest", "name"),
    [
        ("model/phi3-instruct/int4", None, "phi3-instruct-int4"),
        ("model/phi3", None, "phi3"),
        ("out", {"source": HUB, "recipe": "int4-max"}, "phi-3-mini-4k-instruct-int4-max"),
        ("out", {"source": "C:\\models\\Mine\\", "recipe": "fp16"}, "mine-fp16"),
        ("out", {"source": "/home/me/mine", "recipe": None}, "mine"),
    ],
)
def test_short_names(directory: str, manifest: dict[str, str] | None, name: str) -> None:
    info = SimpleNamespace(path=Path("/x") / directory, manifest=manifest)
    assert KnownModel.of(info).name == name  # type: ignore[arg-type]


def test_the_folder_of_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OV_PHI3_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert state_dir() == tmp_path / "ov-phi3"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert state_dir() == tmp_path / "local" / "ov-phi3"
