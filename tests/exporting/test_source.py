"""Sources of an export: directories, names on the hub, and the disk and memory that they need."""

from __future__ import annotations

import argparse
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hf_models import CONFIG, nothing_left, write_json

from ov_phi3.errors import ExportError, ModelError
from ov_phi3.exporting import source
from ov_phi3.exporting.child import ProgressLine
from ov_phi3.exporting.exporter import export
from ov_phi3.system.memory import Memory


@pytest.mark.parametrize("name", ["microsoft/Phi-3-mini-4k-instruct", "a/b.c_d-e"])
def test_names_on_the_hub(name: str) -> None:
    model = source.find_source(name)
    assert (model.name, model.local, model.config) == (name, False, None)


@pytest.mark.parametrize(
    "name", ["phi-3", "./a/b", "/a/b", "a/b/c", "a//b", "../b", "a/..", "a b/c", "", "~/a/b", "a\\b"]
)
def test_neither_directory_nor_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        source.find_source(name)


def test_a_path_is_never_a_hub_name() -> None:
    with pytest.raises(ModelError, match="neither a directory nor a hub name"):
        source.find_source(Path("microsoft/Phi-3-mini-4k-instruct"))


def test_size_and_number_of_the_weights(hf: Path) -> None:
    model = source.local_source(hf)
    assert (model.parameters, model.weight_bytes) == (12, (hf / "model.safetensors").stat().st_size)


def broken(hf: Path, how: str) -> Path:
    """Damage the directory `hf` in a way."""
    weights = hf / "model.safetensors"
    actions = {
        "no config": lambda: (hf / "config.json").unlink(),
        "llama": lambda: write_json(hf / "config.json", {**CONFIG, "model_type": "llama"}),
        "no weights": weights.unlink,
        "exported": lambda: (weights.unlink(), (hf / "openvino_model.xml").touch()),
        "no tokenizer": lambda: (hf / "tokenizer.json").unlink(),
        "cut off": lambda: weights.write_bytes(weights.read_bytes()[:-1]),
        "cut off early": lambda: weights.write_bytes(b"abc"),
        "pointer": lambda: weights.write_text("version https://git-lfs.github.com/spec/v1"),
        "not safetensors": lambda: weights.write_bytes(struct.pack("<Q", 2) + b"xx" * 50),
        "gptq": lambda: write_json(hf / "config.json", {**CONFIG, "quantization_config": {"quant_method": "gptq"}}),
        "adapter": lambda: write_json(hf / "adapter_config.json", {"base_model_name_or_path": "microsoft/Phi-3"}),
        "shard": lambda: write_json(hf / "model.safetensors.index.json", {"weight_map": {"a": "model-2.safetensors"}}),
    }
    actions[how]()
    return hf


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no config", "has no config.json"),
        ("llama", "model_type is 'llama'"),
        ("no weights", "has no weights"),
        ("exported", "is exported already"),
        ("no tokenizer", "has no tokenizer"),
        ("cut off", "is cut off"),
        ("cut off early", "is (cut off|not a safetensors file)"),
        ("pointer", "Git LFS pointer"),
        ("not safetensors", "not a safetensors file"),
        ("gptq", "quantised already .gptq.*full precision"),
        ("adapter", "LoRA adapter.*microsoft/Phi-3.*adapter=PATH"),
        ("shard", "lacks model-2.safetensors"),
    ],
)
def test_damaged_sources_are_refused_before_anything_starts(
    hf: Path, tmp_path: Path, how: str, words: str, played: Any
) -> None:
    played("raise SystemExit('started')")
    with pytest.raises(ModelError, match=words):
        export(broken(hf, how), tmp_path / "out")
    nothing_left(tmp_path, "hf")


def test_a_file_is_no_source(hf: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        source.find_source(hf / "config.json")


@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_the_config_is_downloaded_first(
    tmp_path: Path, model_type: str, played: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real look-up, with the file in the hub's cache."""
    pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "cache" / "models--microsoft--Phi" / "snapshots" / ("c0ffee" * 7)[:40]
    snapshot.mkdir(parents=True)
    write_json(snapshot / "config.json", {**CONFIG, "model_type": model_type})
    refs = tmp_path / "cache" / "models--microsoft--Phi" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    played("print(sys.argv); sys.exit('stopped here')")
    error, words = (ExportError, "stopped here") if model_type == "phi3" else (ModelError, "model_type is 'llama'")
    lines: list[ProgressLine] = []
    with pytest.raises(error, match=words):
        export("microsoft/Phi", tmp_path / "out", progress=lines.append, cache_dir=str(tmp_path / "cache"))
    if model_type == "phi3":
        assert any("'--model', 'microsoft/Phi'" in line and "'adjust'" in line for line in lines)
    assert source.hub_revision(snapshot / "config.json") == snapshot.name


def test_an_unreachable_hub(tmp_path: Path, played: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    played("raise SystemExit('started')")
    with pytest.raises(ExportError, match=r"config.json of 'microsoft/Phi' cannot be fetched.*hub cannot be reached"):
        export("microsoft/Phi", tmp_path / "out", cache_dir=str(tmp_path))


GIB = 2**30


def check_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, disk: float, total: float, free: float
) -> str | None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=int(disk * GIB)))
    memory = Memory(int(total * GIB), int(free * GIB), int(total * GIB), int(free * GIB))
    monkeypatch.setattr(source, "machine_memory", lambda: memory)
    model = source.Source("x", local=True, weight_bytes=8 * GIB, parameters=4 * GIB)
    return source.check_space(model, {"weight_format": "int4"}, tmp_path)


def test_disk_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_room(tmp_path, monkeypatch, disk=20, total=32, free=16) is None
    assert "may be slow, or be killed" in str(check_room(tmp_path, monkeypatch, disk=20, total=32, free=8))
    with pytest.raises(
        ExportError, match=r"10.0 GiB free; the export needs about 11.2 GiB .* \(3.2 GiB for its result\)"
    ):
        check_room(tmp_path, monkeypatch, disk=10, total=32, free=16)
    with pytest.raises(ExportError, match=r"has 8.0 GiB of memory; the export needs about 12.0 GiB"):
        check_room(tmp_path, monkeypatch, disk=20, total=8, free=8)


def test_disk_and_memory_if_the_memory_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source.Source("x", local=True, weight_bytes=8 * GIB, parameters=4 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=20 * GIB))
    for memory in (None, Memory(GIB, GIB)):
        monkeypatch.setattr(source, "machine_memory", lambda memory=memory: memory)
        assert source.check_space(model, {"weight_format": "int4"}, tmp_path) is None
