"""`recipes.py`: its figures on real exports, the fronts, and the cache of exports."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import ov_phi3

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recipes")


def run(recipes: types.ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["recipes.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("_common").exit_with(recipes.main)
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_bytes_perplexity_and_latency_of_real_exports(
    recipes: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    demo_int4: Path,
    demo_fp32: Path,
    demo_hf: Path,
    device: str,
    tmp_path: Path,
) -> None:
    """float32 predicts better and reads more bytes; a recipe whose export fails is named and leaves the others."""

    def exported(_: Path, variant: Any) -> Path:
        if variant.name not in exports:
            raise recipes.BootstrapError("no room left")
        return exports[variant.name]

    exports = {"int4": demo_int4, "fp32": demo_fp32}
    monkeypatch.setattr(recipes, "exported", exported)
    text, target, plot = tmp_path / "text.txt", tmp_path / "recipes.json", tmp_path / "recipes.png"
    text.write_text(" ".join(recipes.TEXT.read_text(encoding="utf-8").split()[:80]), encoding="utf-8")
    sizes = ["--rounds", "1", "--pairs", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--text", text]
    files = ["--json", target, "--plot", plot]
    asked = ["--device", device, "--recipes", "fp32", "int8", *sizes, *files]
    assert run(recipes, monkeypatch, demo_hf, *asked) == 0
    shown = capsys.readouterr().out
    assert "failed: no room left" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads(target.read_text(encoding="utf-8"))
    assert f" on {device} ({report['device']['full_name']})" in shown
    int4, fp32, int8 = report["recipes"]
    assert [one["recipe"] for one in report["recipes"]] == ["int4", "fp32", "int8"]
    assert int8["failed"] == "no room left"
    assert (int4["flags"]["ratio"], fp32["flags"]["weight_format"]) == (0.6, "fp32")
    assert 1 < fp32["perplexity"] < int4["perplexity"] < 100
    ratio, error = fp32["perplexity_over_int4"]
    assert ratio == pytest.approx(fp32["perplexity"] / int4["perplexity"])
    assert 0 < error < 0.2
    assert int4["perplexity_over_int4"] == [1, 0]
    assert 4 * int4["bytes_per_token"] < fp32["bytes_per_token"] < fp32["weight_bytes"] * 1.001
    assert all(len(one[key]) == 2 for one in (int4, fp32) for key in ("tpot_over_int4", "ttft_over_int4"))
    assert "bytes" in int4["fronts"]
    assert "bytes" in fp32["fronts"]
    assert int8["fronts"] == []


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ({}, ""),
        ({"a": (1, 1)}, "a"),
        ({"a": (1, 3), "b": (2, 2), "c": (3, 1)}, "abc"),
        ({"a": (1, 3), "b": (2, 3), "c": (1, 4)}, "a"),
        ({"a": (1, 1), "b": (1, 1)}, "ab"),
        ({"a": (2, 2), "b": (1, 1)}, "b"),
    ],
)
def test_the_front_has_what_nothing_else_beats(
    recipes: types.ModuleType, points: dict[str, tuple[float, float]], best: str
) -> None:
    assert recipes.front(points) == set(best)


def test_a_recipe_is_read_with_its_flags(recipes: types.ModuleType, tmp_path: Path) -> None:
    read = recipes.Variant.parse
    found = read("int4-max,group_size=64,sym=false,backup_precision=int8_sym,ratio=0.8")
    assert found.flags == {"group_size": 64, "sym": False, "backup_precision": "int8_sym", "ratio": 0.8}
    assert "sym" not in found.combined
    text = tmp_path / "text.txt"
    text.write_text("word " * 200, encoding="utf-8")
    assert read("int4-calibrated", str(text)).combined["dataset"] == str(text)
    assert read("int4-calibrated,dataset=python-docs", str(text)).combined["dataset"] == "python-docs"
    assert read("int4-max", str(text)).flags == {}
    with pytest.raises(recipes.Refused, match="'group_size' has no value"):
        read("int4-max,group_size")
    with pytest.raises(ov_phi3.ConfigError, match="Did you mean 'group_size'"):
        read("int4-max,group_sizes=64")


def test_what_would_make_a_wrong_figure_is_refused(
    recipes: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    same = ["--dataset", recipes.TEXT, "--recipes", "int4-calibrated"]
    assert run(recipes, monkeypatch, *same) == 2
    assert "calibrated with the text of --text" in capsys.readouterr().err
    assert run(recipes, monkeypatch, tmp_path) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert run(recipes, monkeypatch, "--text", tmp_path / "none.txt") == 2
    assert "none.txt cannot be read" in capsys.readouterr().err


def test_an_export_is_made_once(
    recipes: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tiny_hf: Path, tmp_path: Path
) -> None:
    variants = importlib.import_module("_variants")
    monkeypatch.setenv("OV_PHI3_CACHE", str(tmp_path))
    variant = variants.Variant.parse("int4-max,group_size=32")
    made = variants.exported(tiny_hf, variant)
    info = ov_phi3.ModelInfo.from_dir(made)
    assert info.manifest is not None
    assert (info.manifest["recipe"], info.manifest["flags"]["group_size"]) == ("int4-max", 32)
    monkeypatch.setattr(variants, "EXPORT", "raise SystemExit('exported twice')")
    assert variants.exported(tiny_hf, variant) == made
    other = variants.Variant.parse("int4-max,group_size=16")
    with pytest.raises(recipes.BootstrapError):
        variants.exported(tiny_hf, other)
