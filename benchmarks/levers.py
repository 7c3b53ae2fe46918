"""The effect of each setting on latency and quality, compared with the defaults in one run.

    python benchmarks/levers.py [MODEL] [--device CPU] [--only threads kv ...] [--other NAME=FOLDER ...] [--json FILE]

The setting and the defaults are loaded side by side and take turns with every prompt. The figure is the median of the
ratios; a setting is exact if all ids are equal. Settings that change the arithmetic also get the perplexity of a fixed
text (`alice.txt`). Loading is timed in separate processes. `--other` names further exports of the same model to compare
with MODEL, such as `int4-max=model/int4-max` (`recipes.py` makes them and weighs quality against bytes); without MODEL,
the demo model is used. `docs/performance.md` has the results.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import add_model_arguments, check_or_demo, exit_with, measured_device, progress, write_json
from _pairs import Pairs, ratio_cells
from _quality import TEXT, score
from ov_phi3.bench.table import table


@dataclass(frozen=True)
class Lever:
    """One setting.

    Attributes:
        group: its group, for `--only`.
        name: its name, as a user would write it.
        ov_config: OpenVINO properties that override the defaults.
        load: further arguments of `ov_phi3.load`.
        model: name of another export to load instead.
        numeric: the setting changes the arithmetic, so its perplexity is measured.
        several: a step may yield several tokens, so the speed depends on the kind of text.
    """

    group: str
    name: str
    ov_config: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    numeric: bool = False
    several: bool = False

    def properties(self, options: argparse.Namespace) -> dict[str, Any] | None:
        """The `ov_config`, with the draft model if the setting has one."""
        if self.group != "draft":
            return self.ov_config or None
        import openvino_genai

        return {"draft_model": openvino_genai.draft_model(str(options.draft), options.device)}


def levers(kind: str, cpus: int, others: list[str], draft: Path | None) -> Iterator[Lever]:
    """The settings to try on this kind of device."""
    yield Lever("none", "the defaults again (noise level)")
    if kind == "CPU":
        for threads in sorted({1, max(1, cpus // 2), 2 * cpus} - {cpus}):
            yield Lever("threads", f"INFERENCE_NUM_THREADS={threads}", {"INFERENCE_NUM_THREADS": str(threads)})
        for value in ("YES", "NO"):
            yield Lever("threads", f"ENABLE_CPU_PINNING={value}", {"ENABLE_CPU_PINNING": value})
            yield Lever("threads", f"ENABLE_HYPER_THREADING={value}", {"ENABLE_HYPER_THREADING": value})
    yield Lever("hint", "PERFORMANCE_HINT=THROUGHPUT", {"PERFORMANCE_HINT": "THROUGHPUT"})
    yield Lever("attention", "ATTENTION_BACKEND=SDPA", {"ATTENTION_BACKEND": "SDPA"})
    yield Lever("mmap", "ENABLE_MMAP=NO", {"ENABLE_MMAP": False})
    for chunk in (0, 256):
        yield Lever("chunk", f"prefill_chunk={chunk}", load={"prefill_chunk": chunk})
    for bits in ("f16", "u8"):
        yield Lever("kv", f"KV_CACHE_PRECISION={bits}", {"KV_CACHE_PRECISION": bits}, numeric=True)
    if kind == "CPU":
        four = {"KEY_CACHE_PRECISION": "u8", "VALUE_CACHE_PRECISION": "u4"}
        yield Lever("kv", "VALUE_CACHE_PRECISION=u4", four, numeric=True)
    for size in (0, 32, 64, 128):
        name = f"DYNAMIC_QUANTIZATION_GROUP_SIZE={size}"
        yield Lever("quantization", name, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(size)}, numeric=True)
    yield Lever("precision", "INFERENCE_PRECISION_HINT=f32", {"INFERENCE_PRECISION_HINT": "f32"}, numeric=True)
    for other in others:
        yield Lever("recipe", f"recipe {other}", model=other, numeric=True)
    yield Lever("lookup", "prompt_lookup", {"prompt_lookup": True}, several=True)
    if draft is not None:
        yield Lever("draft", f"draft_model={draft.name}", several=True)


QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in simple words how a bicycle stays upright.",
    "Write a short letter to a friend about a rainy day.",
    "What are the main parts of a flower?",
    "Tell me how bread is made.",
    "Why is the sky blue?",
    "Describe a walk through a market in the morning.",
    "What should I pack for a week in the mountains?",
)


def prompt_for(text: str, pipe: ov_phi3.Pipeline, tokens: int, rng: random.Random) -> Any:
    """A fresh prompt of one of the kinds of `TEXTS`."""
    number = rng.randrange(10**6)
    if text == "questions":
        return f"Question {number}. {rng.choice(QUESTIONS)}"
    if text == "copying":
        sentences = TEXT.read_text(encoding="utf-8").replace("\n", " ").split(". ")
        start = rng.randrange(len(sentences) - 6)
        passage = ". ".join(sentences[start : start + 6])
        return f"{number}. Repeat this text word for word:\n\n{passage}"
    return ov_phi3.random_prompt(pipe, tokens, rng)


TEXTS = {"random": "", "questions": ", plain questions", "copying": ", text that repeats its prompt"}


@dataclass
class Outcome:
    """The ratios of a setting to the defaults, one per pair; `text` is one of `TEXTS`."""

    lever: Lever
    text: str = "random"
    pairs: Pairs = field(default_factory=Pairs)
    perplexity: float | None = None
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        return {
            "group": self.lever.group,
            "setting": self.lever.name,
            "prompts": self.text,
            "ttft_over_default": self.pairs.ttft,
            "tpot_over_default": self.pairs.tpot,
            "replies_with_equal_ids": self.pairs.equal,
            "perplexity": self.perplexity,
            "failed": self.failed,
        }


def pair(base: ov_phi3.Pipeline, other: ov_phi3.Pipeline, outcome: Outcome, options: argparse.Namespace) -> None:
    """Generate replies to the same prompts with both pipelines, alternating in random order."""
    # The prompts differ per setting: the defaults would reuse cached prompts of another setting.
    rng = random.Random(f"{options.seed} {outcome.lever.name} {outcome.text}")
    for number in range(-1, options.repeat):
        prompt = prompt_for(outcome.text, base, options.prompt_tokens, rng)
        outcome.pairs.reply(base, other, prompt, rng, options.new_tokens, counts=number >= 0)


START = """
import json, sys, time
started = time.perf_counter()
import ov_phi3
pipe = ov_phi3.load(sys.argv[1], sys.argv[2], ov_config=json.loads(sys.argv[3]))
loaded = time.perf_counter()
pipe.generate("Hi", max_new_tokens=1, ignore_eos=True, do_sample=False)
first = time.perf_counter()
print(json.dumps({"load_ms": (loaded - started) * 1e3, "first_ms": (first - loaded) * 1e3,
                  "cache": pipe.load_report.cache}))
"""


def starts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time import and load, and the first token after it, in separate processes that alternate."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cached = {"CACHE_DIR": folder}
        kinds: dict[str, dict[str, Any]] = {
            "the defaults": {},
            "ENABLE_MMAP=NO": {"ENABLE_MMAP": False},
            "CACHE_DIR, from the second start on": cached,
            "ATTENTION_BACKEND=SDPA": {"ATTENTION_BACKEND": "SDPA"},
            "ATTENTION_BACKEND=SDPA, CACHE_DIR, from the second start on": {**cached, "ATTENTION_BACKEND": "SDPA"},
        }
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for number in range(options.starts + 1):
            for name, properties in kinds.items():
                progress(f"start {number} of {options.starts}: {name}")
                command = [sys.executable, "-c", START, str(options.model), options.device, json.dumps(properties)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 0 and number:
                    samples[name].append(json.loads(done.stdout.splitlines()[-1]))
    return [{"setting": name, "samples": rows} for name, rows in samples.items()]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="threads, kv, recipe, lookup, start, ...")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=FOLDER", help="another export of MODEL")
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens that prompt and reply share")
    parser.add_argument("--draft", type=Path, metavar="FOLDER", help="a smaller model with the same tokenizer")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=8, metavar="N", help="pairs per setting (default: %(default)s)")
    parser.add_argument(
        "--perplexity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of the fixed text, for settings that change the arithmetic; not for random weights (default: yes)",
    )
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser.parse_args()


def measure(options: argparse.Namespace, others: dict[str, Path]) -> list[Outcome]:
    """Measure all settings, one after the other."""
    outcomes = []
    common = {"device": options.device, "context_length": options.context_length}
    with ov_phi3.load(options.model, **common) as base:
        ids = base.tokenizer.encode(TEXT.read_text(encoding="utf-8")).tolist()
        defaults = dict(base.load_report.ov_config)
        reference = Outcome(Lever("none", "the defaults"))
        if options.perplexity:
            reference.perplexity = score(options.model, options.device, ids, defaults).perplexity
        outcomes.append(reference)
        for lever in levers(base.device.kind, ov_phi3.Machine.here().logical_cpus, list(others), options.draft):
            if options.only and lever.group not in options.only:
                continue
            progress(lever.name)
            model = others.get(lever.model, options.model)
            for kind in TEXTS if lever.several else ("random",):
                outcome = Outcome(lever, kind)
                outcomes.append(outcome)
                try:
                    with ov_phi3.load(model, **common, **lever.load, ov_config=lever.properties(options)) as other:
                        pair(base, other, outcome, options)
                    if lever.numeric and options.perplexity:
                        properties = {**defaults, **lever.ov_config}
                        outcome.perplexity = score(model, options.device, ids, properties).perplexity
                except (ov_phi3.Error, RuntimeError) as error:
                    outcome.failed = " ".join(str(error).split())[:200]
    return outcomes


def tables(outcomes: list[Outcome], started: list[dict[str, Any]]) -> str:
    """The results as tables."""
    rows = [("setting", "TTFT ratio", "quartiles", "TPOT ratio", "quartiles", "equal ids", "perplexity")]
    for outcome in outcomes:
        name = outcome.lever.name + TEXTS[outcome.text]
        if outcome.failed:
            rows.append((name, "-", "", "-", "", "", f"failed: {outcome.failed}"))
            continue
        pairs = outcome.pairs
        equal = f"{pairs.equal} of {len(pairs.ttft)}" if pairs.ttft else ""
        quality = "" if outcome.perplexity is None else f"{outcome.perplexity:.4f}"
        rows.append((name, *ratio_cells(pairs.ttft), *ratio_cells(pairs.tpot), equal, quality))
    parts = []
    if outcomes:
        parts.append(
            f"{table(rows)}\nMedian of the ratios to the defaults, pair by pair; below 1 the setting is faster."
        )
    if started:
        lines = [("start in a new process", "load ms", "first token ms", "compile cache")]
        for row in started:
            load, first = (ov_phi3.Summary.of(s[key] for s in row["samples"]) for key in ("load_ms", "first_ms"))
            if load and first:
                cache = row["samples"][-1]["cache"]
                lines.append((row["setting"], f"{load.p50:.0f}", f"{first.p50:.0f}", cache))
        parts.append(table(lines))
    return "\n\n".join(parts)


def main() -> int:
    """Measure, print tables, write the JSON."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    began = time.perf_counter()
    others = {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in options.other)}
    check_or_demo(options)
    outcomes = [] if options.only == ["start"] else measure(options, others)
    started = starts(options) if not options.only or "start" in options.only else []
    progress("")
    device = measured_device(options)
    print(f"{ov_phi3.Machine.here()}\n{options.model} on {device}\n\n{tables(outcomes, started)}")
    if options.json:
        report = {
            "machine": ov_phi3.Machine.here().to_dict(),
            "device": asdict(device),
            "model": str(options.model),
            "settings": [outcome.to_dict() for outcome in outcomes],
            "starts": started,
            "seconds": time.perf_counter() - began,
        }
        write_json(options.json, report)
    return 0


if __name__ == "__main__":
    exit_with(main)
