"""What `speculation="auto"` gains on text that repeats its prompt, and costs on text that does not, in one run.

    python benchmarks/speculation.py [MODEL] [--device CPU] [--temperature 0 1] [--minutes N] [--json FILE]
        [--draft SMALLER_MODEL [--draft-device DEVICE]]

Every reply is generated with and without speculation, in random order, on one pipeline; the figure is the median of the
ratios of the time per token. The replies that repeat their prompt are given texts, which a logits processor enforces,
so that any model gives them; the others are the model's own. Both kinds are also compared id by id, and replies with
the same seed with each other. All texts take turns, until every text has `--repeat` pairs or the time is over; each has
one pair at least. Without MODEL, the demo model is used.

With `--draft`, a second pipeline has that draft model, and every pair becomes a triple: without, with lookup, and with
lookup or the draft model, whichever is expected to be faster.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
from _speculation_bound import least_steps_per_token
from _speculation_texts import PLAIN, REPEATING
from ov_phi3.bench.table import table

LOOKUP, DRAFT = "lookup", "draft model"
_AT_MOST = "At most: tokens per step if each step drafted exactly the tokens that lookup predicts right."
WHERE = {True: "where the reply repeats its prompt", False: "elsewhere"}


@dataclass
class Outcome:
    """Replies to one prompt at one temperature with drafts of one source, each beside one without."""

    text: str
    repeats: bool
    temperature: float
    source: str
    least_steps: float | None = None
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


@dataclass
class Work:
    """One prompt at one temperature, with its outcome for each source of drafts."""

    prompt: str
    reply: str
    outcomes: list[Outcome]


def run(pipes: dict[str, ov_phi3.Pipeline], work: Work, options: argparse.Namespace, number: int) -> None:
    """Generate a reply without drafts and one for each source; those with number -1 are not measured."""
    text, temperature = work.outcomes[0].text, work.outcomes[0].temperature
    plain = pipes[LOOKUP]
    ids = plain.encode(work.prompt)
    config: dict[str, Any] = {"max_new_tokens": options.new_tokens, "ignore_eos": True, "temperature": temperature}
    if work.reply:
        forced = plain.tokenizer.encode_continuation(work.reply).tolist()
        config |= {"max_new_tokens": len(forced), "logits_processors": [forcing(len(ids), forced)]}
        work.outcomes[0].least_steps = least_steps_per_token(ids.tolist(), forced)  # of lookup, which comes first
    if temperature:
        config["seed"] = random.Random(f"{options.seed} {text}").randrange(2**32)
    results = {}
    kinds = ["", *pipes]
    for source in random.Random(f"{text} {number}").sample(kinds, len(kinds)):
        kind: ov_phi3.Speculation = "auto" if source else "off"
        results[source] = pipes.get(source, plain).generate(ids, speculation=kind, **config)
    off = results[""]
    for outcome in work.outcomes:
        reply = results[outcome.source]
        outcome.replies.add(tuple(reply.token_ids))
        if number >= 0:
            outcome.tpot.append((reply.metrics.tpot_ms or math.nan) / (off.metrics.tpot_ms or math.nan))
            outcome.equal += off.token_ids == reply.token_ids
            outcome.tokens_per_step.append(reply.metrics.tokens_per_step or math.nan)
            outcome.drafted += reply.metrics.drafted_tokens or 0
            outcome.accepted += reply.metrics.accepted_tokens or 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    add_load_arguments(parser)
    parser.add_argument("--draft", type=Path, metavar="FOLDER", help="a smaller model with the same tokenizer")
    parser.add_argument("--draft-device", metavar="DEVICE", help="its device (default: the model's)")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N", help="of a model's own (default: 96)")
    parser.add_argument("--repeat", type=int, default=4, metavar="N", help="pairs per text (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="limit (default: %(default)s)")
    parser.add_argument("--only", choices=["repeating", "plain"], help="one kind of text")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser.parse_args()


def measure(pipes: dict[str, ov_phi3.Pipeline], options: argparse.Namespace) -> list[Outcome]:
    """All texts, at all temperatures."""
    for pipe in pipes.values():
        pipe.warmup(speculation="auto")
    texts = [(name, prompt, reply) for name, (prompt, reply) in REPEATING.items() if options.only != "plain"]
    texts += [(question, question, "") for question in PLAIN if options.only != "repeating"]
    works = [
        Work(prompt, reply, [Outcome(name, bool(reply), temperature, source) for source in pipes])
        for name, prompt, reply in texts
        for temperature in options.temperature
    ]
    began = time.perf_counter()
    for number in range(-1, options.repeat):
        for work in works:
            if number > 0 and time.perf_counter() - began > 60.0 * options.minutes:
                break
            progress(f"round {number + 1}: {work.outcomes[0].text}, temperature {work.outcomes[0].temperature:g}")
            run(pipes, work, options, number)
    return [outcome for work in works for outcome in work.outcomes]


def results(outcomes: list[Outcome]) -> str:
    """The results as a table, with the highest ratio of each kind of text."""
    rows = [
        (
            "text",
            "drafts by",
            "temperature",
            "TPOT ratio",
            "quartiles",
            "tokens per step",
            "at most",
            "accepted",
            "equal ids",
            "replies",
        )
    ]
    medians: dict[tuple[str, bool], list[float]] = {}
    for outcome in outcomes:
        ratio, step = ov_phi3.Summary.of(outcome.tpot), ov_phi3.Summary.of(outcome.tokens_per_step)
        if ratio is None or step is None:
            continue
        medians.setdefault((outcome.source, outcome.repeats), []).append(ratio.p50)
        rows.append(
            (
                outcome.text[:30],
                outcome.source,
                f"{outcome.temperature:g}",
                f"{ratio.p50:.3f}",
                f"{ratio.p25:.3f} to {ratio.p75:.3f}",
                f"{step.p50:.2f}",
                "" if outcome.least_steps is None else f"{1 / outcome.least_steps:.2f}",
                f"{outcome.accepted} of {outcome.drafted}",
                f"{outcome.equal} of {len(outcome.tpot)}",
                str(len(outcome.replies)),
            )
        )
    lines = [table(rows), "Median of the ratios to speculation='off', round by round.", _AT_MOST]
    for (source, repeats), ratios in medians.items():
        lines.append(f"{source}, {WHERE[repeats]}: median {statistics.median(ratios):.3f}, highest {max(ratios):.3f}")
    for repeats in (True, False):
        ratios = over_lookup([outcome for outcome in outcomes if outcome.repeats == repeats])
        if (summary := ov_phi3.Summary.of(ratios)) is not None:
            quartiles = f"{summary.p25:.3f} to {summary.p75:.3f}"
            lines.append(f"{DRAFT} over {LOOKUP}, {WHERE[repeats]}: {summary.p50:.3f} ({quartiles})")
    return "\n".join(lines)


def over_lookup(outcomes: list[Outcome]) -> list[float]:
    """Times per token with the draft model over those with lookup alone, of the same rounds."""
    lookups = {(other.text, other.temperature): other.tpot for other in outcomes if other.source == LOOKUP}
    ratios: list[float] = []
    for outcome in outcomes:
        if outcome.source == DRAFT:
            pairs = zip(outcome.tpot, lookups[outcome.text, outcome.temperature], strict=True)
            ratios += [drafted / lookup for drafted, lookup in pairs]
    return ratios


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    began = time.perf_counter()
    check_or_demo(options)
    with ExitStack() as stack:
        load: dict[str, Any] = {"backend": "infer_request", **load_options(options)}
        pipes = {LOOKUP: stack.enter_context(ov_phi3.load(options.model, **load))}
        if options.draft is not None or options.draft_device is not None:
            load |= {"draft_model": options.draft, "draft_device": options.draft_device}
            pipes[DRAFT] = stack.enter_context(ov_phi3.load(options.model, **load))
        draft = pipes[DRAFT].load_report.draft if DRAFT in pipes else None
        outcomes = measure(pipes, options)
    progress("")
    device = measured_device(options)
    beside = "" if draft is None else f", draft model {draft.path} on {draft.device}"
    print(f"{ov_phi3.Machine.here()}\n{options.model} on {device}{beside}\n\n{results(outcomes)}")
    if options.json:
        report = {
            "machine": ov_phi3.Machine.here().to_dict(),
            "device": asdict(device),
            "model": str(options.model),
            "draft_model": None if draft is None else draft.to_dict(),
            "texts": [outcome.to_dict() for outcome in outcomes],
            "seconds": time.perf_counter() - began,
        }
        write_json(options.json, report)
    return 0


if __name__ == "__main__":
    exit_with(main)
