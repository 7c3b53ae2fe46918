"""Which recipe of an export predicts best for its bytes, and what it costs in TPOT and TTFT.

    python benchmarks/recipes.py [SOURCE] [--recipes int4-max int4-max,group_size=64 ...] [--json FILE] [--plot FILE]

SOURCE is a model in Hugging Face format; without it, the demo model's is taken. Each recipe, with flags of `export`
behind commas where they are wanted, is exported once and kept in the cache. The figures are the bytes of the weights,
those that a token reads, the perplexity of a text that no recipe was calibrated with (`alice.txt`), and TPOT and TTFT
over those of the cookbook's `int4`: in every round both are loaded anew and take turns with every prompt. The row of
`int4` itself compares two loads of it, which is the noise. A recipe is on a front if no other has a lower perplexity at
no more bytes a token, or no more time a token.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _environment import BootstrapError, run_installed

if __name__ == "__main__":
    run_installed(*(["matplotlib"] if "--plot" in sys.argv else []))

import ov_phi3
from _common import Refused, add_load_arguments, check, exit_with, load_options, measured_device, progress, write_json
from _pairs import Pairs, ratio_cells
from _quality import TEXT, score
from _variants import BASE, Variant, exported
from ov_phi3.bench.roofline import weight_bytes_per_token
from ov_phi3.bench.table import table

RECIPES = ("int4-max", "int4-calibrated", "int8", "fp16")


@dataclass
class Outcome:
    """What was measured of a recipe.

    Attributes:
        variant: the recipe with its flags.
        model: directory of the export; None if it failed.
        weight_bytes: size of the weights.
        bytes_per_token: bytes of weights that a token reads.
        logprobs: natural log-probability of each token of the text.
        pairs: latency over that of the cookbook's recipe.
        failed: why there are no figures; '' if there are.
    """

    variant: Variant
    model: Path | None = None
    weight_bytes: int = 0
    bytes_per_token: int = 0
    logprobs: list[float] = field(default_factory=list)
    pairs: Pairs = field(default_factory=Pairs)
    failed: str = ""

    @property
    def perplexity(self) -> float:
        """Perplexity of the text."""
        return math.exp(-statistics.fmean(self.logprobs))

    @property
    def tpot(self) -> float | None:
        """Median of the ratios of the times per output token."""
        return statistics.median(self.pairs.tpot) if self.pairs.tpot else None

    def perplexity_over(self, base: Outcome) -> tuple[float, float]:
        """The ratio of the perplexities, and its standard error from the differences token by token."""
        differences = [before - now for before, now in zip(base.logprobs, self.logprobs, strict=True)]
        ratio = math.exp(statistics.fmean(differences))
        return ratio, ratio * statistics.stdev(differences) / math.sqrt(len(differences))


def front(points: dict[str, tuple[float, float]]) -> set[str]:
    """The names of the points that no other point equals or undercuts in both coordinates (the Pareto front)."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    }


def fronts(outcomes: list[Outcome]) -> dict[str, set[str]]:
    """The fronts of perplexity against bytes a token, and against TPOT."""
    whole = [outcome for outcome in outcomes if not outcome.failed]
    timed = {o.variant.name: (o.tpot, o.perplexity) for o in whole if o.tpot is not None}
    return {
        "bytes": front({o.variant.name: (o.bytes_per_token, o.perplexity) for o in whole}),
        "TPOT": front(timed),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="directory of a model in Hugging Face format")
    parser.add_argument("--device", default="CPU", help="exactly one device (default: %(default)s)")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=list(RECIPES),
        metavar="RECIPE[,FLAG=VALUE...]",
        help=f"beside {BASE} (default: {' '.join(RECIPES)})",
    )
    parser.add_argument("--dataset", metavar="TEXT", help="calibrate with this text file (default: the recipe's own)")
    parser.add_argument("--text", type=Path, default=TEXT, metavar="FILE", help="text to predict (default: alice.txt)")
    add_load_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="0 for no latency (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="per recipe and round (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the fronts to this PNG file")
    return parser.parse_args()


def variants(options: argparse.Namespace) -> list[Variant]:
    """The cookbook's recipe and the others, checked."""
    names = dict.fromkeys([BASE, *options.recipes])
    found = [Variant.parse(name, options.dataset) for name in names]
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--text {options.text} cannot be read as UTF-8 text: {error}") from error
    for variant in found:
        dataset = Path(str(variant.combined.get("dataset", "")))
        if dataset.is_file() and dataset.read_text(encoding="utf-8") == text:
            raise Refused(f"{variant.name} is calibrated with the text of --text; name a text that it does not know.")
    if options.source is not None and not (options.source / "config.json").is_file():
        raise Refused(f"{options.source} has no config.json; expected a directory in Hugging Face format.")
    return found


def predict(outcome: Outcome, options: argparse.Namespace) -> None:
    """Export a recipe, and set its sizes and the log-probabilities of the text."""
    progress(f"{outcome.variant.name}: export")
    outcome.model = exported(options.source, outcome.variant)
    outcome.weight_bytes = ov_phi3.ModelInfo.from_dir(outcome.model).weight_bytes
    outcome.bytes_per_token = weight_bytes_per_token(outcome.model / "openvino_model.xml")
    progress(f"{outcome.variant.name}: perplexity")
    with ov_phi3.load(outcome.model, **load_options(options)) as pipe:
        ids = pipe.tokenizer.encode(options.text.read_text(encoding="utf-8")).tolist()
        properties = dict(pipe.load_report.ov_config)
    if len(ids) < 3:
        raise Refused(f"--text {options.text} has {len(ids)} tokens; expected a text of some length.")
    outcome.logprobs = score(outcome.model, options.device, ids, properties).logprobs


def compare_latency(outcomes: list[Outcome], options: argparse.Namespace) -> None:
    """Measure every recipe beside the first one; at most two models are loaded at a time."""
    rng = random.Random(options.seed)
    for number in range(options.rounds):
        with ov_phi3.load(outcomes[0].model or "", **load_options(options)) as base:
            for outcome in rng.sample(outcomes, len(outcomes)):
                progress(f"round {number + 1} of {options.rounds}: {outcome.variant.name}")
                with ov_phi3.load(outcome.model or "", **load_options(options)) as other:
                    for pair in range(-1, options.pairs):
                        prompt = ov_phi3.random_prompt(base, options.prompt_tokens, rng)
                        outcome.pairs.reply(base, other, prompt, rng, options.new_tokens, counts=pair >= 0)


def measure(options: argparse.Namespace) -> list[Outcome]:
    """All figures; a recipe that cannot be exported has the reason in their place, the cookbook's raises it."""
    outcomes = [Outcome(variant) for variant in variants(options)]
    for outcome in outcomes:
        try:
            predict(outcome, options)
        except (ov_phi3.Error, BootstrapError) as error:
            if outcome is outcomes[0]:
                raise
            outcome.failed = " ".join(str(error).split())[:200]
    compare_latency([outcome for outcome in outcomes if not outcome.failed], options)
    return outcomes


def text_of(outcomes: list[Outcome]) -> str:
    """The results as a table."""
    rows = [
        ("recipe", "MB", "MB a token", "perplexity", f"over {BASE}", "TPOT", "quartiles", "TTFT", "quartiles", "front")
    ]
    best = fronts(outcomes)
    for outcome in outcomes:
        name = outcome.variant.name
        if outcome.failed:
            rows.append((name, "-", "-", "-", "", "-", "", "-", "", f"failed: {outcome.failed}"))
            continue
        ratio, error = outcome.perplexity_over(outcomes[0])
        rows.append(
            (
                name,
                f"{outcome.weight_bytes / 1e6:.1f}",
                f"{outcome.bytes_per_token / 1e6:.1f}",
                f"{outcome.perplexity:.2f}",
                f"{ratio:.3f} +- {error:.3f}",
                *ratio_cells(outcome.pairs.tpot),
                *ratio_cells(outcome.pairs.ttft),
                ", ".join(kind for kind, names in best.items() if name in names),
            )
        )
    return (
        f"{table(rows)}\nTPOT and TTFT over those of {BASE}, in pairs; below 1 the recipe is faster. "
        f"The row of {BASE} compares two loads of it.\nPerplexity of {len(outcomes[0].logprobs)} tokens; +- is a "
        "standard error over them."
    )


def report_of(outcomes: list[Outcome], options: argparse.Namespace) -> dict[str, Any]:
    """All figures and samples as JSON-ready values."""
    best = fronts(outcomes)
    recipes = [
        {
            "recipe": o.variant.name,
            "flags": o.variant.combined,
            "failed": o.failed,
            "weight_bytes": o.weight_bytes,
            "bytes_per_token": o.bytes_per_token,
            "perplexity": o.perplexity if o.logprobs else None,
            "perplexity_over_int4": o.perplexity_over(outcomes[0]) if o.logprobs else None,
            "tpot_over_int4": o.pairs.tpot,
            "ttft_over_int4": o.pairs.ttft,
            "fronts": [kind for kind, names in best.items() if o.variant.name in names],
        }
        for o in outcomes
    ]
    return {
        "machine": ov_phi3.Machine.here().to_dict(),
        "device": asdict(measured_device(options)),
        "source": str(options.source or "the demo model"),
        "text": {"file": options.text.name, "tokens": len(outcomes[0].logprobs)},
        "recipes": recipes,
    }


def main() -> int:
    """Measure, print the table, write JSON and plot."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    check(options, needs_model=False)
    outcomes = measure(options)
    progress("")
    source, device = options.source or "The demo model", measured_device(options)
    print(f"{ov_phi3.Machine.here()}\n{source} on {device}\n\n{text_of(outcomes)}")
    if options.json:
        write_json(options.json, report_of(outcomes, options))
    if options.plot:
        from _plots import plot_recipes

        print(plot_recipes(report_of(outcomes, options), options.plot))
    return 0


if __name__ == "__main__":
    exit_with(main)
