"""A report of an emulated GPU says so: in the JSON, in the text, and in the caption of each plot."""

from __future__ import annotations

import argparse
import importlib
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import DeviceInfo

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FULL_NAME = "GPU.0 (Intel(R) UHD Graphics 630 (emulated) (iGPU)"
ReportOf = Callable[..., ov_phi3.Report]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> types.ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions of all plots, in order; nothing is written to disk."""
    plots = module("_plots")
    texts: list[str] = []

    def save(figure: Any, path: Path, caption: str) -> Path:
        texts.append(caption)
        plots.plt.close(figure)
        return path

    monkeypatch.setattr(plots, "_save", save)
    return texts


def test_a_latency_report_names_the_emulated_device(
    report_of: ReportOf, emulated: DeviceInfo, captions: list[str], tmp_path: Path
) -> None:
    report = report_of({32: (50.0, 25.0), 64: (60.0, 25.0)})
    assert f"device   {FULL_NAME}" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["device"]["full_name"] == emulated.full_name
    module("_plots").plot_report(report, tmp_path)
    assert len(captions) == 2
    assert all(FULL_NAME in caption for caption in captions)


def test_a_comparison_names_the_emulated_device(emulated: DeviceInfo, captions: list[str], tmp_path: Path) -> None:
    comparison = module("_comparison")
    figures = [("ttft_8", [2.0], [4.0]), ("tpot_8", [1.0], [1.5])]
    made = comparison.Comparison(
        figures=tuple(comparison.Figure.of(k, {"ov_phi3": a, "openvino_genai": b}) for k, a, b in figures),
        peers=("ov_phi3", "openvino_genai"),
        dropped={},
        unequal={},
        equal_ids={},
        settings={"threads": 2, "new_tokens": 4},
        versions={},
        machine=ov_phi3.Machine.here(),
        device=emulated,
        model={"path": "/models/mini", "quantization": "f32", "weight_bytes": 1},
        rooflines=dict.fromkeys(("ov_phi3", "openvino_genai"), ov_phi3.Roofline(1e9, 10**6, 10.0)),
        bandwidths=[1e9],
    )
    assert f"/models/mini (f32) on {FULL_NAME}" in module("_comparison_text").comparison_text(made)
    assert json.loads(json.dumps(made.to_dict()))["device"]["full_name"] == emulated.full_name
    module("_plots").plot_comparison(made, tmp_path / "compare.png")
    assert len(captions) == 1
    assert FULL_NAME in captions[0]


@pytest.mark.parametrize("name", ["GPU.0", "gpu.0", "GPU"])
def test_the_scripts_find_the_full_name_of_the_measured_device(
    name: str, emulated: DeviceInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = DeviceInfo("CPU", "a CPU", "CPU")
    monkeypatch.setattr(ov_phi3, "devices", lambda: [other, emulated])
    common, options = module("_common"), argparse.Namespace(device=name, model=Path("model"))
    assert common.refusal(options) is None
    assert common.measured_device(options) == emulated
