"""Texts from this machine for the data-aware methods of an export."""

from __future__ import annotations

from pathlib import Path

import pytest
from exporter import needs_exporter

import ov_phi3
from ov_phi3.errors import ConfigError
from ov_phi3.exporting.calibration import PYTHON_DOCS, check_dataset, is_local, read_samples
from ov_phi3.exporting.exporter import export

WORDS = "".join(f"word{number} and then " for number in range(4000))


def test_samples_are_spread_over_the_text_and_start_at_words(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(WORDS, encoding="utf-8")
    samples = read_samples(str(file), 10)
    assert len(samples) == 10
    assert samples[0] == WORDS[:512]
    assert samples[-1] == WORDS[-512:].partition(" ")[2]
    assert all(sample in WORDS and f" {sample}" in f" {WORDS}" for sample in samples)
    assert len(read_samples(str(file))) == 128
    file.write_text(WORDS[:1000], encoding="utf-8")
    assert read_samples(str(file)) == [WORDS[:512]]


def test_python_brings_a_text_along() -> None:
    samples = read_samples(PYTHON_DOCS, 64)
    assert len(set(samples)) == 64
    assert "the" in " ".join(samples).split()


def test_names_and_files_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(WORDS, encoding="utf-8")
    assert check_dataset(str(file)) == str(file)
    for name in ("auto", "wikitext2", "wikitext2:seq_len=64"):
        assert check_dataset(name) == name
        assert not is_local(name)
    file.write_text("short", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has 5 characters; expected at least 512"):
        check_dataset(str(file))
    file.write_bytes(b"\xff" * 1000)
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        check_dataset(str(file))


@needs_exporter
def test_the_calibrated_recipe_exports_and_generates_and_its_text_decides(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(WORDS, encoding="utf-8")
    info = export(tiny, tmp_path / "docs", "int4-calibrated", num_samples=4)
    assert (info.manifest or {})["flags"]["dataset"] == PYTHON_DOCS
    assert info.quantization.startswith("int4_sym")
    export(tiny, tmp_path / "file", "int4-calibrated", num_samples=4, dataset=str(file))
    weights = [(tmp_path / name / "openvino_model.bin").read_bytes() for name in ("docs", "file")]
    assert weights[0] != weights[1]
    with ov_phi3.load(info.path, "CPU") as pipe:
        assert len(pipe.generate("Hi", max_new_tokens=4, ignore_eos=True).token_ids) == 4
