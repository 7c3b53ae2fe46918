"""The time that saved KV caches save, and the cost of the backend that supports them.

    python benchmarks/snapshots.py [MODEL] [--device CPU] [--tokens 512] [--json FILE] [--check]

*Saved prefixes*: in each round one pipeline prefills a fresh prompt of `--tokens` tokens and saves its KV cache, and
another pipeline loads the file and generates a token after it. Loading is compared with the time to first token of
fresh prompts of the same length, in the same run. The first rounds of a process are slower, as memory for the sequence
is allocated: the first one is reported separately ("cold"), and the following warm-up rounds are discarded.

*The backend*: time to first token and per-token latency of `backend="infer_request"` divided by those of
`llm_pipeline`, side by side with fresh prompts of `--prompt-tokens` tokens, alternating; and the peak memory of both,
each in a separate process.

Without MODEL the demo model is made. With `--check` the exit code is 1 if a goal is missed. docs/kv-snapshots.md has
the results.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _environment import BootstrapError, demo_model, run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import add_model_arguments, exit_with, measured_device, progress, refusal, write_json
from ov_phi3.bench.table import table
from ov_phi3.system.memory import peak_memory_bytes

GREEDY: dict[str, Any] = {"ignore_eos": True, "do_sample": False}
BACKENDS = ("llm_pipeline", "infer_request")
MEMORY = (256, 64, 2)  # prompt tokens, new tokens, replies


@dataclass(frozen=True)
class Goal:
    """A figure of this run and its upper limit; `most` is None if there is no goal for a model of this size."""

    name: str
    value: float
    most: float | None

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.most is None or self.value <= self.most

    def row(self) -> tuple[str, str, str, str]:
        """A row of the table of goals."""
        verdict = "" if self.most is None else "met" if self.met else "MISSED"
        return self.name, self._text(self.value), "-" if self.most is None else self._text(self.most), verdict

    def _text(self, value: float) -> str:
        return f"1/{1 / value:.0f}" if "prefilling" in self.name else f"{value:.3f}"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a function, and its duration in milliseconds."""
    started = time.perf_counter()
    result = work()
    return result, (time.perf_counter() - started) * 1000.0


def saved_prefixes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prefill, save, load and continue; return all samples, in milliseconds."""
    rng = random.Random(options.seed)
    load = {"device": options.device, "backend": "infer_request"}
    with ov_phi3.load(options.model, **load) as writer, ov_phi3.load(options.model, **load) as reader:
        writer.warmup()
        reader.warmup()
        progress("prefilling ...")
        prefill = prefill_times(writer, rng, options)
        rounds = []
        for number in range(1 + options.warmup + options.repeat):
            progress(f"loading, round {number + 1} ...")
            rounds.append(save_and_load(writer, reader, rng, folder / "prefix.kv", options.tokens))
        switching = switch_prefixes(reader, rng, options)
        float16_bytes = options.tokens * reader.info.kv_bytes_per_token
    first, measured = rounds[0], rounds[1 + options.warmup :]
    return {
        "tokens": options.tokens,
        "dtype": first["dtype"],
        "exact": first["exact"],
        "file_bytes": first["file_bytes"],
        "float16_bytes": float16_bytes,
        "equal_ids": all(row["equal_ids"] for row in rounds),
        "prefill_ms": prefill,
        "prefill_and_read_ms": statistics.median(row["prefill_and_read_ms"] for row in measured),
        "save_ms": statistics.median(row["save_ms"] for row in measured),
        "cold_load_ms": first["load_ms"],
        "cold_next_token_ms": first["load_and_next_token_ms"],
        "load_ms": [row["load_ms"] for row in measured],
        "load_and_next_token_ms": [row["load_and_next_token_ms"] for row in measured],
        "switch_and_next_token_ms": switching,
    }


def prefill_times(pipe: ov_phi3.Pipeline, rng: random.Random, options: argparse.Namespace) -> list[float]:
    """Time to first token of fresh prompts, milliseconds, after a warm-up prompt."""
    times = []
    for number in range(-1, options.repeat):
        ids = ov_phi3.random_prompt(pipe, options.tokens, rng)
        ttft_ms = pipe.generate(ids, max_new_tokens=1, **GREEDY).metrics.ttft_ms
        if number >= 0:
            times.append(ttft_ms or math.nan)
    return times


def save_and_load(
    writer: ov_phi3.Pipeline, reader: ov_phi3.Pipeline, rng: random.Random, path: Path, tokens: int
) -> dict[str, Any]:
    """Save a fresh prefix with one pipeline; load it with another, which has none of its tokens, and continue.

    Both pipelines continue with the same token, under equal conditions, so the ids of the replies must be equal.
    """
    ids = ov_phi3.random_prompt(writer, tokens, rng)
    prefix, prefill_and_read_ms = timed(lambda: writer.prefill(ids))
    size, save_ms = timed(functools.partial(prefix.save, path))
    expected = writer.generate([5], prefix=prefix, max_new_tokens=16, **GREEDY)
    loaded, load_ms = timed(lambda: reader.load_prefix(path))
    reply = reader.generate([5], prefix=loaded, max_new_tokens=16, **GREEDY)
    return {
        "dtype": prefix.dtype,
        "exact": prefix.exact,
        "file_bytes": size,
        "prefill_and_read_ms": prefill_and_read_ms,
        "save_ms": save_ms,
        "load_ms": load_ms,
        "load_and_next_token_ms": load_ms + (reply.metrics.ttft_ms or math.nan),
        "equal_ids": reply.token_ids == expected.token_ids,
    }


def switch_prefixes(pipe: ov_phi3.Pipeline, rng: random.Random, options: argparse.Namespace) -> list[float]:
    """Milliseconds to the next token of two prefixes in memory, alternating."""
    ids = [ov_phi3.random_prompt(pipe, options.tokens, rng) for _ in range(2)]
    prefixes = [pipe.prefill(prompt) for prompt in ids]
    samples = []
    for number in range(2 * (options.warmup + options.repeat)):
        progress(f"switching, round {number + 1} ...")
        prefix = prefixes[number % 2]
        samples.append(
            timed(lambda p=prefix, n=number: pipe.generate([200 + n], prefix=p, max_new_tokens=1, **GREEDY))[1]
        )
    return samples[2 * options.warmup :]


def latency_pairs(options: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """TTFT and TPOT of both backends, milliseconds, one pair per prompt."""
    rng = random.Random(options.seed + 1)
    with (
        ov_phi3.load(options.model, device=options.device) as default,
        ov_phi3.load(options.model, device=options.device, backend="infer_request") as own_loop,
    ):
        pipes = dict(zip(BACKENDS, (default, own_loop), strict=True))
        pairs = []
        for number in range(-1, options.pairs):
            progress(f"latency, pair {number + 1} ...")
            prompt = ov_phi3.random_prompt(own_loop, options.prompt_tokens, rng)
            pair = {}
            for name in rng.sample(BACKENDS, 2):
                metrics = pipes[name].generate(prompt, max_new_tokens=options.new_tokens, **GREEDY).metrics
                pair[name] = {"ttft": metrics.ttft_ms or math.nan, "tpot": metrics.tpot_ms or math.nan}
            if number >= 0:
                pairs.append(pair)
    return pairs


def peak_memory(options: argparse.Namespace) -> dict[str, int]:
    """Peak resident memory, in bytes, of a process with each backend; empty where the system does not report it."""
    peaks = {}
    for backend in BACKENDS:
        progress(f"peak memory of {backend} ...")
        command = [sys.executable, __file__, str(options.model), "--device", options.device, "--memory-of", backend]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        if peak := json.loads(done.stdout):
            peaks[backend] = peak
    return peaks


def own_peak(options: argparse.Namespace) -> int:
    """Load one backend, use it, and return the peak memory of this process; 0 where it is unknown."""
    prompt, new, replies = MEMORY
    rng = random.Random(options.seed)
    with ov_phi3.load(options.model, device=options.device, backend=options.memory_of) as pipe:
        for _ in range(replies):
            pipe.generate(ov_phi3.random_prompt(pipe, prompt, rng), max_new_tokens=new, **GREEDY)
        return peak_memory_bytes() or 0


def find_goals(report: dict[str, Any]) -> list[Goal]:
    """The figures of this run with their goals."""
    goals = []
    large = report["weight_bytes"] > 2**30  # a small model prefills so fast that there is little to save
    if prefix := report.get("prefix"):
        prefill = statistics.median(prefix["prefill_ms"])
        load, following = (statistics.median(prefix[key]) for key in ("load_ms", "load_and_next_token_ms"))
        goals += [
            Goal("loading / prefilling", load / prefill, 1 / 50 if large else None),
            Goal("loading and the next token / prefilling", following / prefill, 1 / 25 if large else None),
            # The file also holds the ids (8 bytes each) and a header.
            Goal(
                "file / float16 cache",
                prefix["file_bytes"] / (prefix["float16_bytes"] + 8 * prefix["tokens"] + 32_768),
                1.0,
            ),
        ]
    for figure, most in ("tpot", 1.01 if large else 1.02), ("ttft", None):
        if ratios := [pair["infer_request"][figure] / pair["llm_pipeline"][figure] for pair in report.get("pairs", [])]:
            name = f"{figure.upper()} after {report['prompt_tokens']} tokens / llm_pipeline's"
            goals.append(Goal(name, statistics.median(ratios), most))
    if len(peaks := report.get("peak_bytes", {})) == 2:
        goals.append(Goal("peak memory / llm_pipeline's", peaks["infer_request"] / peaks["llm_pipeline"], 1.0))
    return goals


def report_text(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    if prefix := report.get("prefix"):
        rows = [("", "median", "lowest", "highest")]
        for key, name in (
            ("prefill_ms", "prefill, first token"),
            ("load_ms", "load"),
            ("load_and_next_token_ms", "load and next token"),
            ("switch_and_next_token_ms", "switch and next token"),
        ):
            rows.append((name, *spread(prefix[key])))
        lines += [
            f"A prefix of {prefix['tokens']} tokens, {prefix['file_bytes'] / 2**20:.1f} MiB as {prefix['dtype']}:",
            table(rows),
            f"the first round, cold: load {prefix['cold_load_ms']:.0f} ms, load and next token "
            f"{prefix['cold_next_token_ms']:.0f} ms; saved in {prefix['save_ms']:.0f} ms",
            f"ids after loading {'equal' if prefix['equal_ids'] else 'DIFFER from'} those before saving",
            "",
        ]
    return "\n".join([*lines, table([("", "here", "goal", ""), *(goal.row() for goal in find_goals(report))])])


def spread(samples: Sequence[float]) -> tuple[str, str, str]:
    """Median, minimum and maximum, as text."""
    return tuple(f"{value:.0f} ms" for value in (statistics.median(samples), min(samples), max(samples)))  # type: ignore[return-value]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="length of the prefix (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measured rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=6, metavar="N", help="warm-up rounds (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=int, default=8, metavar="N", help="replies of each backend (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=32, metavar="N", help="length of their prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=48, metavar="N", help="length of replies (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=["prefix", "tokens", "memory"], default=["prefix", "tokens", "memory"]
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--memory-of", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print the report, write the JSON."""
    options = parse_arguments()
    if problem := refusal(options, needs_model=False):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        if options.memory_of:
            print(own_peak(options))
            return 0
        options.model = Path(options.model or demo_model("int4"))
        report: dict[str, Any] = {"model": options.model.name, "machine": ov_phi3.Machine.here().to_dict()}
        device = measured_device(options)
        report["device"] = asdict(device)
        report["weight_bytes"] = ov_phi3.ModelInfo.from_dir(options.model).weight_bytes
        with tempfile.TemporaryDirectory() as folder:
            if "prefix" in options.only:
                report["prefix"] = saved_prefixes(options, Path(folder))
        if "tokens" in options.only:
            report |= {"prompt_tokens": options.prompt_tokens, "pairs": latency_pairs(options)}
        if "memory" in options.only:
            report["peak_bytes"] = peak_memory(options)
    except (ov_phi3.Error, BootstrapError, subprocess.CalledProcessError) as error:
        progress("")
        print(f"error: {error}", file=sys.stderr)
        return 1
    progress("")
    report["goals"] = {goal.name: [goal.value, goal.most] for goal in find_goals(report)}
    print(f"{ov_phi3.Machine.here()}\n{options.model.name} on {device}\n\n{report_text(report)}")
    if options.json:
        write_json(options.json, report)
    missed = not all(goal.met for goal in find_goals(report)) or not report.get("prefix", {}).get("equal_ids", True)
    return int(options.check and missed)


if __name__ == "__main__":
    exit_with(main)
