"""`ov-phi3 models`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ov_phi3.bench.table import table
from ov_phi3.cli import terminal
from ov_phi3.cli.model_list import known_models
from ov_phi3.errors import Error

if TYPE_CHECKING:
    from ov_phi3.cli.model_list import KnownModel
    from ov_phi3.model.info import ModelInfo

__all__ = ["add_models"]


def add_models(commands: Any) -> None:
    """Add the `models` command."""
    parser = commands.add_parser(
        "models",
        help="list the exported models",
        description="List the models that `ov-phi3 export` made here, and those that a command has loaded. Every "
        "command takes such a name, or the name on the hub, in place of the directory.",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> int:
    from ov_phi3.model.info import ModelInfo

    rows = []
    for model in known_models():
        try:
            rows.append((model, ModelInfo.from_dir(model.path)))
        except Error as exc:
            terminal.note(f"{model.path} is left out: {exc}")
    if args.json:
        print(json.dumps([_report(model, info) for model, info in rows], indent=2))
    elif rows:
        sizes = [("NAME", "SIZE", "CONTEXT", "SOURCE", "DIRECTORY")]
        for model, info in rows:
            size = f"{info.weight_bytes / 2**20:,.0f} MiB"
            sizes.append((model.name, size, f"{info.context_length:,}", model.source or "-", model.path))
        print(table(sizes))
    else:
        terminal.note(
            "No models here yet. `ov-phi3 export microsoft/Phi-3-mini-4k-instruct DIRECTORY`, for instance, makes one."
        )
    return 0


def _report(model: KnownModel, info: ModelInfo) -> dict[str, Any]:
    return {
        **asdict(model),
        "family": info.family,
        "quantization": info.quantization,
        "weight_bytes": info.weight_bytes,
        "context_length": info.context_length,
    }
