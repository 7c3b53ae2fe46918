"""Published latency of Phi-3-mini and Phi-4-mini on Intel processors, to print a measured run beside it.

The figures are those of OpenVINO's own tables, `docs/sphinx_setup/_static/benchmarks_files/llm_models_*.csv` in
https://github.com/openvinotoolkit/openvino. `published.csv` names the file and a commit of that repository that has it.
The columns of the source are "1st latency" (here TTFT, time to first token) and "2nd latency" (here TPOT, time per
output token). Of several rows with the same model, precision and prompt length, it has the one with the lowest TPOT.
Prompt lengths other than 32 and 1,024 tokens are left out, and with them the file of the Core Ultra 9 288V.
"""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.bench.table import table

if TYPE_CHECKING:
    import ov_phi3

__all__ = ["CAVEATS", "SOURCE", "Published", "against_dict", "against_text", "published", "published_for"]

TABLE = Path(__file__).with_name("published.csv")
LENGTHS = (32, 1024)
SOURCE = "https://github.com/openvinotoolkit/openvino, docs/sphinx_setup/_static/benchmarks_files"
CAVEATS = (
    "The source names the processor, not the device; OpenVINO's page presents the figures as those of built-in GPUs.",
    "It does not name OpenVINO's release, the driver, the length of the replies, or how the weights were compressed. "
    "Of several rows this is the one with the lowest TPOT.",
    "Its clock is not described. llm_bench, OpenVINO's tool for such figures, takes the engine's, without queueing "
    "and hand-over.",
)
EMULATED = "This run's device is emulated: its figures are those of a CPU, and say nothing about a GPU."

# The size that the published models have; ModelInfo.family also covers Phi-3-medium.
_MINI = {"num_layers": 32, "hidden_size": 3072}
_MODELS = {"phi-3": "phi-3", "phi-3-april-2024": "phi-3", "phi-3.5": "phi-3", "phi-4-mini": "phi-4-mini"}
_PRECISIONS = {"int4": "INT4", "int8": "INT8", "f16": "FP16"}


@dataclass(frozen=True)
class Published:
    """A row of `published.csv`; times are in milliseconds, None where the source has no figure.

    Attributes:
        processor: the processor that the source's file is named after.
        model: the model, as the source names it.
        precision: the precision of the weights, as the source names it.
        ttft_ms: time to first token, by prompt length.
        tpot_ms: time per output token, by prompt length.
        file: the source's file.
        commit: a commit of the source's repository with this version of the file.
    """

    processor: str
    model: str
    precision: str
    ttft_ms: dict[int, float | None]
    tpot_ms: dict[int, float | None]
    file: str
    commit: str


def published() -> Iterator[Published]:
    """All rows of `published.csv`."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            ttft, tpot = (
                {length: float(text) if (text := row[f"{kind}_ms_{length}"]) else None for length in LENGTHS}
                for kind in ("ttft", "tpot")
            )
            yield Published(row["processor"], row["model"], row["precision"], ttft, tpot, row["file"], row["commit"])


def published_for(model: Mapping[str, Any]) -> list[Published]:
    """The rows of a model's family, in the model's precision; empty if there are none.

    Args:
        model: `Report.model`.
    """
    if any(model[name] != value for name, value in _MINI.items()):
        return []
    family = _MODELS.get(model["family"])
    precision = next((name for prefix, name in _PRECISIONS.items() if model["quantization"].startswith(prefix)), None)
    if family is None or precision is None:
        return []
    return [row for row in published() if row.precision.startswith(precision) and _family(row.model) == family]


def _family(model: str) -> str:
    return "phi-4-mini" if model.startswith("phi-4-mini") else "phi-3"


def against_text(report: ov_phi3.Report) -> str:
    """A measured run beside the published rows of the same family, with source and caveats, as text."""
    rows = published_for(report.model)
    if not rows:
        model = report.model
        return (
            f"Published figures: none for this model ({model['family']}, {model['quantization']}, "
            f"{model['num_layers']} layers of {model['hidden_size']}).\n"
            "There are some for Phi-3-mini, Phi-3.5-mini and Phi-4-mini in int4, int8 and float16."
        )
    lines = [("", "model", "precision", *(f"{kind} {n}" for n in LENGTHS for kind in ("TTFT", "TPOT")))]
    lines += _measured(report)
    lines += [(row.processor, row.model, row.precision, *_cells(row.ttft_ms, row.tpot_ms)) for row in rows]
    files = sorted({f"{row.file} at {row.commit[:12]}" for row in rows})
    emulated = [EMULATED] if "(emulated)" in report.device["full_name"] else []
    return "\n".join(
        [
            f"Published figures, milliseconds after {' and '.join(str(n) for n in LENGTHS)} prompt tokens",
            table(lines),
            *(textwrap.fill(sentence, 118) for sentence in [*emulated, *CAVEATS]),
            f"Source: {SOURCE}:",
            *(f"  {file}" for file in files),
        ]
    )


def against_dict(report: ov_phi3.Report) -> dict[str, Any]:
    """The published rows of a report's model, with source and caveats, as JSON-ready values."""
    return {"source": SOURCE, "caveats": CAVEATS, "rows": [asdict(row) for row in published_for(report.model)]}


def _measured(report: ov_phi3.Report) -> list[tuple[str, ...]]:
    """Two rows of the measured run: as the caller sees it, and by the engine's clock."""
    by_length = {m.prompt_tokens: m for m in report}
    tpot = {n: by_length[n].tpot_ms if n in by_length else None for n in LENGTHS}
    caller = {n: by_length[n].ttft_ms if n in by_length else None for n in LENGTHS}
    engine = {n: ttft.p50 if n in by_length and (ttft := by_length[n].engine_ttft) else None for n in LENGTHS}
    name, precision = Path(report.model["path"]).name, report.model["quantization"].partition(",")[0]
    device = report.device["full_name"]
    return [
        (f"this run: {device}", name, precision, *_cells(caller, tpot)),
        ("this run, by the engine's clock", name, precision, *_cells(engine, tpot)),
    ]


def _cells(ttft: Mapping[int, float | None], tpot: Mapping[int, float | None]) -> list[str]:
    """Times of all lengths as text, in the order of the columns."""
    return ["-" if value is None else f"{value:.1f}" for n in LENGTHS for value in (ttft[n], tpot[n])]
