"""What `speculation="auto"` gains on text that repeats its prompt, and costs on text that does not, in one run.

    python benchmarks/speculation.py [MODEL] [--device CPU] [--temperature 0 1] [--minutes N] [--json FILE]

Every reply is generated with and without speculation, in random order, on one pipeline; the figure is the median of the
ratios of the time per token. The replies that repeat their prompt are given texts, which a logits processor enforces,
so that any model gives them; the others are the model's own. Both kinds are also compared id by id, and replies with
the same seed with each other. All texts take turns, until every text has `--repeat` pairs or the time is over; each has
one pair at least. Without MODEL, the demo model is used.
"""

from __future__ import annotations

import argparse
import math
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import numpy as np

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
from _speculation_texts import PLAIN, REPEATING
from ov_phi3.bench.table import table


@dataclass
class Outcome:
    """Pairs of replies to one prompt at one temperature."""

    text: str
    repeats: bool
    temperature: float
    tpot: list[float] = field(default_factory=list)
    equal: int = 0
    replies: set[tuple[int, ...]] = field(default_factory=set)
    tokens_per_step: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        values = {key: value for key, value in vars(self).items() if key != "replies"}
        return {**values, "tpot_auto_over_off": values.pop("tpot"), "different_replies": len(self.replies)}


def forcing(prompt_tokens: int, reply: list[int]) -> Callable[[Any, Any], Any]:
    """A logits processor that lets only the next token of a reply through."""

    def force(ids: Any, logits: Any) -> Any:
        token = reply[len(ids) - prompt_tokens]
        wanted = logits[token]
        logits[:] = -np.inf
        logits[token] = wanted if np.isfinite(wanted) else 0.0
        return logits

    return force


def run(
    pipe: ov_phi3.Pipeline, outcome: Outcome, prompt: str, reply: str, options: argparse.Namespace, number: int
) -> None:
    """Generate a pair of replies; the one with number -1 is not measured."""
    rng = random.Random(f"{options.seed} {outcome.text}")
    ids = pipe.encode(prompt)
    config: dict[str, Any] = {"max_new_tokens": options.new_tokens, "ignore_eos": True}
    if reply:
        forced = pipe.tokenizer.encode_continuation(reply).tolist()
        config = {"max_new_tokens": len(forced), "ignore_eos": True, "logits_processors": [forcing(len(ids), forced)]}
    config["temperature"] = outcome.temperature
    if outcome.temperature:
        config["seed"] = rng.randrange(2**32)
    results = {}
    for kind in random.Random(f"{outcome.text} {number}").sample(["off", "auto"], 2):
        results[kind] = pipe.generate(ids, speculation=kind, **config)
    outcome.replies.add(tuple(results["auto"].token_ids))
    if number < 0:
        return
    off, auto = results["off"].metrics, results["auto"].metrics
    outcome.tpot.append((auto.tpot_ms or math.nan) / (off.tpot_ms or math.nan))
    outcome.equal += results["off"].token_ids == results["auto"].token_ids
    outcome.tokens_per_step.append(auto.tokens_per_step or math.nan)
    outcome.drafted += auto.drafted_tokens or 0
    outcome.accepted += auto.accepted_tokens or 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    add_load_arguments(parser)
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N", help="of a model's own (default: 96)")
    parser.add_argument("--repeat", type=int, default=4, metavar="N", help="pairs per text (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="limit (default: %(default)s)")
    parser.add_argument("--only", choices=["repeating", "plain"], help="one kind of text")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser.parse_args()


def measure(pipe: ov_phi3.Pipeline, options: argparse.Namespace) -> list[Outcome]:
    """All texts, at all temperatures."""
    pipe.warmup(speculation="auto")
    texts = [(name, prompt, reply) for name, (prompt, reply) in REPEATING.items() if options.only != "plain"]
    texts += [(question, question, "") for question in PLAIN if options.only != "repeating"]
    works = [
        (Outcome(name, bool(reply), temperature), prompt, reply)
        for name, prompt, reply in texts
        for temperature in options.temperature
    ]
    began = time.perf_counter()
    for number in range(-1, options.repeat):
        for outcome, prompt, reply in works:
            if number > 0 and time.perf_counter() - began > 60.0 * options.minutes:
                break
            progress(f"pair {number + 1}: {outcome.text}, temperature {outcome.temperature:g}")
            run(pipe, outcome, prompt, reply, options, number)
    return [outcome for outcome, _, _ in works]


def results(outcomes: list[Outcome]) -> str:
    """The results as a table, with the highest ratio of each kind of text."""
    rows = [("text", "temperature", "TPOT ratio", "quartiles", "tokens per step", "accepted", "equal ids", "replies")]
    worst = {True: 0.0, False: 0.0}
    for outcome in outcomes:
        ratio, step = ov_phi3.Summary.of(outcome.tpot), ov_phi3.Summary.of(outcome.tokens_per_step)
        if ratio is None or step is None:
            continue
        worst[outcome.repeats] = max(worst[outcome.repeats], ratio.p50)
        rows.append(
            (
                outcome.text[:30],
                f"{outcome.temperature:g}",
                f"{ratio.p50:.3f}",
                f"{ratio.p25:.3f} to {ratio.p75:.3f}",
                f"{step.p50:.2f}",
                f"{outcome.accepted} of {outcome.drafted}",
                f"{outcome.equal} of {len(outcome.tpot)}",
                str(len(outcome.replies)),
            )
        )
    summary = (
        f"Highest median ratio: {worst[True]:.3f} where the reply repeats its prompt, {worst[False]:.3f} elsewhere."
    )
    return f"{table(rows)}\nMedian of the ratios to speculation='off', pair by pair. {summary}"


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    began = time.perf_counter()
    check_or_demo(options)
    with ov_phi3.load(options.model, backend="infer_request", **load_options(options)) as pipe:
        outcomes = measure(pipe, options)
    progress("")
    device = measured_device(options)
    print(f"{ov_phi3.Machine.here()}\n{options.model} on {device}\n\n{results(outcomes)}")
    if options.json:
        report = {
            "machine": ov_phi3.Machine.here().to_dict(),
            "device": asdict(device),
            "model": str(options.model),
            "texts": [outcome.to_dict() for outcome in outcomes],
            "seconds": time.perf_counter() - began,
        }
        write_json(options.json, report)
    return 0


if __name__ == "__main__":
    exit_with(main)
