"""What the plots show: percentiles that their samples carry, and legends beside the data."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ov_phi3

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_plots")


@pytest.fixture
def figures(plots: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures by file name, drawn but not written."""
    drawn: dict[str, Any] = {}

    def save(figure: Any, path: Path, caption: str) -> Path:
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.canvas.draw()
        drawn[path.name] = figure
        return path

    monkeypatch.setattr(plots, "_save", save)
    return drawn


def lines_marked(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text().startswith("p")]


@pytest.mark.parametrize(("values", "shown"), [(0, []), (9, [50]), (45, [50, 90]), (99, [50, 90]), (100, [50, 90, 99])])
def test_percentiles_are_those_that_the_samples_carry(plots: types.ModuleType, values: int, shown: list[int]) -> None:
    assert plots._shown_percentiles(values) == shown


def test_no_p99_is_drawn_for_few_gaps(
    plots: types.ModuleType, figures: dict[str, Any], report_of: Callable[..., ov_phi3.Report], tmp_path: Path
) -> None:
    report = report_of({32: (50.0, 25.0), 64: (60.0, 25.0)})
    gaps = min(sum(len(s.inter_token_ms) for s in m.samples) for m in report.measurements)
    plots.plot_report(report, tmp_path)
    assert gaps < 100
    assert "p99" not in lines_marked(figures["inter-token.png"])
    assert "p50" in lines_marked(figures["inter-token.png"])


def test_legends_hide_nothing(
    plots: types.ModuleType, figures: dict[str, Any], report_of: Callable[..., ov_phi3.Report], tmp_path: Path
) -> None:
    plots.plot_report(report_of({32: (50.0, 25.0), 64: (60.0, 25.0)}), tmp_path)
    assert len(figures) == 2
    for name, figure in figures.items():
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
        assert legends, name
        for legend in legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), name
