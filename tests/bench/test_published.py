"""OpenVINO's published figures: the rows of the table, and a measured run printed beside them."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ov_phi3

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ReportOf = Callable[..., ov_phi3.Report]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _published

    return _published


def mini(**changed: Any) -> dict[str, Any]:
    return {"family": "phi-3", "quantization": "int4_sym", "num_layers": 32, "hidden_size": 3072, **changed}


def test_every_row_has_plausible_figures_and_its_source(module: types.ModuleType) -> None:
    rows = list(module.published())
    assert len({(row.processor, row.model, row.precision) for row in rows}) == len(rows) >= 60
    for row in rows:
        name = row.processor.rpartition(" ")[2]
        assert re.fullmatch(rf"llm_models_\d-{name}\.csv", row.file)
        assert re.fullmatch("[0-9a-f]{40}", row.commit)
        assert re.fullmatch("INT4(-MIXED)?|INT8(-CW)?|FP16", row.precision)
        assert row.ttft_ms.keys() == row.tpot_ms.keys() == {32, 1024}
        for n in (32, 1024):
            ttft, tpot = row.ttft_ms[n], row.tpot_ms[n]
            assert (ttft is None) is (tpot is None)
            assert ttft is None or 10 < tpot < ttft < 3000
        assert row.ttft_ms[1024] is None or row.ttft_ms[32] < row.ttft_ms[1024]


def test_one_file_has_one_commit(module: types.ModuleType) -> None:
    sources = {(row.file, row.commit) for row in module.published()}
    assert len({file for file, _ in sources}) == len(sources)


def test_figures_of_the_core_ultra_x7_358h(module: types.ModuleType) -> None:
    rows = {row.model: row for row in module.published_for(mini()) if row.processor == "Core Ultra X7 358H"}
    assert rows.keys() == {"phi-3-mini-4k-instruct", "phi-3-mini-128k-instruct", "phi-3.5-mini-instruct"}
    row = rows["phi-3-mini-128k-instruct"]
    assert (row.ttft_ms, row.tpot_ms) == ({32: 29.0, 1024: 190.3}, {32: 20.1, 1024: 22.4})


@pytest.mark.parametrize(
    ("model", "names", "precision"),
    [
        (mini(), {"phi-3", "phi-3.5"}, "INT4"),
        (mini(family="phi-3-april-2024"), {"phi-3", "phi-3.5"}, "INT4"),
        (mini(family="phi-3.5", quantization="int8_asym"), {"phi-3", "phi-3.5"}, "INT8"),
        (mini(family="phi-4-mini", quantization="f16"), {"phi-4"}, "FP16"),
    ],
)
def test_rows_are_of_the_models_family_and_precision(
    module: types.ModuleType, model: dict[str, Any], names: set[str], precision: str
) -> None:
    rows = module.published_for(model)
    assert {row.model.partition("-mini")[0] for row in rows} == names
    assert {row.precision.partition("-")[0] for row in rows} == {precision}


@pytest.mark.parametrize(
    "model",
    [
        mini(family="phi3-compatible"),
        mini(family="phi-4"),
        mini(quantization="f32"),
        mini(num_layers=40, hidden_size=5120),
    ],
)
def test_other_models_have_no_published_figures(
    module: types.ModuleType, model: dict[str, Any], report_of: ReportOf
) -> None:
    assert module.published_for(model) == []
    text = module.against_text(report_of(**model))
    assert text.startswith(f"Published figures: none for this model ({model['family']}, {model['quantization']}")
    assert module.against_dict(report_of(**model))["rows"] == []


def test_the_run_stands_above_the_published_rows(module: types.ModuleType, report_of: ReportOf) -> None:
    lines = module.against_text(report_of({32: (51.25, 25.0), 1024: (400.0, 28.0)})).splitlines()
    assert lines[1].split()[-8:] == ["TTFT", "32", "TPOT", "32", "TTFT", "1024", "TPOT", "1024"]
    assert lines[2].startswith("this run: Intel(R) UHD Graphics 630 (emulated) (iGPU)  mini")
    assert lines[2].split()[-5:] == ["int4_sym", "51.2", "25.0", "400.0", "28.0"]
    assert lines[3].split()[-4:] == ["50.2", "25.0", "399.0", "28.0"]
    assert "Core Ultra X7 358H" in lines[4]
    assert lines[4].split()[-5:] == ["INT4-MIXED", "29.2", "20.1", "190.8", "22.5"]
    assert max(map(len, lines)) <= 150


def test_lengths_that_were_not_measured_stay_empty(module: types.ModuleType, report_of: ReportOf) -> None:
    lines = module.against_text(report_of({32: (50.0, 25.0), 64: (60.0, 26.0)})).splitlines()
    assert lines[2].split()[-4:] == ["50.0", "25.0", "-", "-"]


def test_source_and_caveats_are_printed(module: types.ModuleType, report_of: ReportOf) -> None:
    text = module.against_text(report_of())
    for part in (
        "names the processor, not the device",
        "does not name OpenVINO's release",
        "github.com/openvinotoolkit",
    ):
        assert part in text
    assert "llm_models_7-358H.csv at 374c54e2fbdb" in text
    assert "This run's device is emulated" in text
    data = json.loads(json.dumps(module.against_dict(report_of())))
    assert data["rows"][0]["commit"] == "374c54e2fbdbbf57f9af8834ffc53f71782b1395"
    assert len(data["caveats"]) == 3
