"""Time per token of a reply that follows a JSON schema, over that of one without, on our own engine in one run.

    python benchmarks/structured.py [MODEL] [--device CPU] [--repeat N] [--json FILE]

Replies with and without the schema alternate in random order; the figure is the median of the ratios, pair by pair. The
time per token counts forced tokens, which take no pass; the time per pass tells what the structure itself costs.
Without MODEL, the demo model is used.
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from dataclasses import asdict
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import (
    add_load_arguments,
    add_model_arguments,
    check_or_demo,
    exit_with,
    load_options,
    measured_device,
    progress,
    write_json,
)
from ov_phi3.bench.table import table

_RECORD: dict[str, Any] = {
    "name": {"type": "string", "maxLength": 30},
    "email": {"type": "string", "maxLength": 40},
    "favourite colour": {"enum": ["dark red", "dark green", "light blue"]},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "strings, nothing is forced": {"type": "array", "items": {"type": "string"}, "minItems": 1000},
    "records": {
        "type": "array",
        "items": {"type": "object", "properties": _RECORD, "required": [*_RECORD], "additionalProperties": False},
        "minItems": 1000,
    },
}
PROMPT = "Write a JSON list of people: Ada Martin, 34, likes dark green; Ben Okafor, 51, likes light blue."


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """For each schema and each pair: ratios of the times per token and per pass, and the tokens of a pass."""
    outcomes: dict[str, list[dict[str, float]]] = {}
    config = {"max_new_tokens": options.new_tokens, "ignore_eos": True, "do_sample": False}
    with ov_phi3.load(options.model, backend="infer_request", **load_options(options)) as pipe:
        for name, schema in SCHEMAS.items():
            progress(name)
            rng = random.Random(name)
            for number in range(-1, options.repeat):
                results = {}
                for structure in rng.sample([None, schema], 2):
                    prompt = f"{rng.randrange(10**6)}. {PROMPT}"
                    results[structure is None] = pipe.generate(prompt, json_schema=structure, **config).metrics
                if number < 0:
                    continue
                plain, structured = results[True], results[False]
                ratio = (structured.tpot_ms or math.nan) / (plain.tpot_ms or math.nan)
                per_step = structured.tokens_per_step or math.nan
                outcomes.setdefault(name, []).append(
                    {"time per token": ratio, "time per pass": ratio * per_step, "tokens per pass": per_step}
                )
    return outcomes


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    add_load_arguments(parser)
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=8, metavar="N", help="pairs per schema (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    check_or_demo(options)
    outcomes = measure(options)
    progress("")
    rows = [("with a schema over without", "median", "quartiles")]
    for name, pairs in outcomes.items():
        for figure in pairs[0]:
            ratio = ov_phi3.Summary.of(pair[figure] for pair in pairs)
            if ratio is not None:
                rows.append((f"{name}: {figure}", f"{ratio.p50:.3f}", f"{ratio.p25:.3f} to {ratio.p75:.3f}"))
    device = measured_device(options)
    print(f"{ov_phi3.Machine.here()}\n{options.model} on {device}\n\n{table(rows)}")
    if options.json:
        machine = ov_phi3.Machine.here().to_dict()
        write_json(options.json, {"machine": machine, "device": asdict(device), "schemas": outcomes})
    return 0


if __name__ == "__main__":
    exit_with(main)
