"""What a saved KV cache saves, and what the backend that has it costs.

    python benchmarks/snapshots.py [MODEL] [--device CPU] [--tokens 512] [--json FILE] [--check]

*Saved prefixes*: a prompt of `--tokens` tokens is prefilled, its keys and values are saved, and each round loads the
file and goes on from it by one token, a different one each time. What loading is held against is the time to first
token of fresh prompts of the same length, in the same run. The first rounds of a process are slower than the later
ones, as memory for the sequence is new to it: the very first one is told apart ("cold"), and the next ones are thrown
away.

*The backend*: per-token latency of `backend="infer_request"` over `llm_pipeline`, side by side with prompts of 32
tokens that nothing has seen, in turns; and the peak memory of both, each in a process of its own.

Without MODEL the demo model is made. `--check` makes the exit code 1 when a goal is missed. What came out is in
docs/kv-snapshots.md.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _environment import BootstrapError, demo_model, run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import add_model_arguments, exit_with, progress, refusal, write_json
from ov_phi3.bench.table import table
from ov_phi3.system.memory import peak_memory_bytes

GREEDY: dict[str, Any] = {"ignore_eos": True, "do_sample": False}
BACKENDS = ("llm_pipeline", "infer_request")
MEMORY = (256, 64, 2)  # prompt tokens, new tokens, replies


@dataclass(frozen=True)
class Goal:
    """A figure of this run and the most that it should be; None where there is no goal for such a model."""

    name: str
    value: float
    most: float | None

    @property
    def met(self) -> bool:
        """Whether it is no more than that."""
        return self.most is None or self.value <= self.most

    def row(self) -> tuple[str, str, str, str]:
        """For a table."""
        said = "" if self.most is None else "met" if self.met else "MISSED"
        return self.name, self._text(self.value), "-" if self.most is None else self._text(self.most), said

    def _text(self, value: float) -> str:
        return f"1/{1 / value:.0f}" if "prefilling" in self.name else f"{value:.3f}"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a function gives, and its milliseconds."""
    begun = time.perf_counter()
    found = work()
    return found, (time.perf_counter() - begun) * 1000.0


def saved_prefixes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prefill, save, load and go on; every sample, in milliseconds."""
    draw = random.Random(options.seed)
    path = folder / "prefix.kv"
    with ov_phi3.load(options.model, device=options.device, backend="infer_request") as pipe:
        pipe.warmup()
        progress("prefilling ...")
        prefill = []
        for number in range(-1, options.repeat):
            ids = ov_phi3.random_prompt(pipe, options.tokens, draw)
            spent = pipe.generate(ids, max_new_tokens=1, **GREEDY).metrics.ttft_ms
            if number >= 0:
                prefill.append(spent or math.nan)
        ids = ov_phi3.random_prompt(pipe, options.tokens, draw)
        made, building = timed(lambda: pipe.prefill(ids))
        size, saving = timed(functools.partial(made.save, path))
        wanted = pipe.generate([5, 6, 7], prefix=made, max_new_tokens=16, **GREEDY).token_ids
        facts = {"dtype": made.dtype, "exact": made.exact}
        del made
        rounds = []
        equal = True
        for number in range(1 + options.warmup + options.repeat):
            progress(f"loading, round {number + 1} ...")
            begun = time.perf_counter()
            prefix, loading = timed(lambda: pipe.load_prefix(path))
            pipe.generate([100 + number], prefix=prefix, max_new_tokens=1, **GREEDY)
            rounds.append((loading, (time.perf_counter() - begun) * 1000.0))
            found = pipe.generate([5, 6, 7], prefix=prefix, max_new_tokens=16, **GREEDY).token_ids
            equal = equal and found == wanted
            del prefix
        switching = switched(pipe, draw, options)
        float16 = options.tokens * pipe.info.kv_bytes_per_token
    kept = rounds[1 + options.warmup :]
    return {
        "tokens": options.tokens,
        **facts,
        "file_bytes": size,
        "float16_bytes": float16,
        "equal_ids": equal,
        "prefill_ms": prefill,
        "prefill_and_read_ms": building,
        "save_ms": saving,
        "cold_load_ms": rounds[0][0],
        "cold_next_token_ms": rounds[0][1],
        "load_ms": [load for load, _ in kept],
        "load_and_next_token_ms": [total for _, total in kept],
        "switch_and_next_token_ms": switching,
    }


def switched(pipe: ov_phi3.Pipeline, draw: random.Random, options: argparse.Namespace) -> list[float]:
    """Milliseconds to a next token from two prefixes in memory, in turns."""
    ids = [ov_phi3.random_prompt(pipe, options.tokens, draw) for _ in range(2)]
    held = [pipe.prefill(prompt) for prompt in ids]
    spent = []
    for number in range(2 * (options.warmup + options.repeat)):
        progress(f"switching, round {number + 1} ...")
        prefix = held[number % 2]
        spent.append(
            timed(lambda p=prefix, n=number: pipe.generate([200 + n], prefix=p, max_new_tokens=1, **GREEDY))[1]
        )
    return spent[2 * options.warmup :]


def per_token(options: argparse.Namespace) -> list[dict[str, float]]:
    """TPOT of both backends, in milliseconds, one pair for each prompt."""
    draw = random.Random(options.seed + 1)
    with (
        ov_phi3.load(options.model, device=options.device) as theirs,
        ov_phi3.load(options.model, device=options.device, backend="infer_request") as mine,
    ):
        pipes = dict(zip(BACKENDS, (theirs, mine), strict=True))
        pairs = []
        for number in range(-1, options.pairs):
            progress(f"per-token latency, pair {number + 1} ...")
            prompt = ov_phi3.random_prompt(mine, 32, draw)
            names = draw.sample(BACKENDS, 2)
            found = {name: pipes[name].generate(prompt, max_new_tokens=48, **GREEDY).metrics.tpot_ms for name in names}
            if number >= 0:
                pairs.append({name: found[name] or math.nan for name in BACKENDS})
    return pairs


def peak_memory(options: argparse.Namespace) -> dict[str, int]:
    """Peak resident memory in bytes of a process with each backend; nothing where the system does not tell."""
    peaks = {}
    for backend in BACKENDS:
        progress(f"peak memory of {backend} ...")
        command = [sys.executable, __file__, str(options.model), "--device", options.device, "--memory-of", backend]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        if peak := json.loads(done.stdout):
            peaks[backend] = peak
    return peaks


def own_peak(options: argparse.Namespace) -> int:
    """Load one backend, use it, and give this process's peak of memory; 0 where that is not known."""
    prompt, new, replies = MEMORY
    draw = random.Random(options.seed)
    with ov_phi3.load(options.model, device=options.device, backend=options.memory_of) as pipe:
        for _ in range(replies):
            pipe.generate(ov_phi3.random_prompt(pipe, prompt, draw), max_new_tokens=new, **GREEDY)
        return peak_memory_bytes() or 0


def goals(report: dict[str, Any]) -> list[Goal]:
    """What this run shows, against what it should."""
    found = []
    large = report["weight_bytes"] > 2**30  # a small model prefills in no time: there is little to save
    if prefix := report.get("prefix"):
        prefill = statistics.median(prefix["prefill_ms"])
        load, following = (statistics.median(prefix[key]) for key in ("load_ms", "load_and_next_token_ms"))
        found += [
            Goal("loading / prefilling", load / prefill, 1 / 50 if large else None),
            Goal("loading and the next token / prefilling", following / prefill, 1 / 25 if large else None),
            # The ids (8 bytes each) and the header are not keys and values.
            Goal(
                "file / float16 cache",
                prefix["file_bytes"] / (prefix["float16_bytes"] + 8 * prefix["tokens"] + 32_768),
                1.0,
            ),
        ]
    if pairs := report.get("per_token_ms"):
        ratios = [pair["infer_request"] / pair["llm_pipeline"] for pair in pairs]
        found.append(Goal("TPOT / llm_pipeline's", statistics.median(ratios), 1.02 if large else 1.05))
    if len(peaks := report.get("peak_bytes", {})) == 2:
        found.append(Goal("peak memory / llm_pipeline's", peaks["infer_request"] / peaks["llm_pipeline"], 1.1))
    return found


def shown(report: dict[str, Any]) -> str:
    """The report for a person."""
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
    return "\n".join([*lines, table([("", "here", "goal", ""), *(goal.row() for goal in goals(report))])])


def spread(samples: Sequence[float]) -> tuple[str, str, str]:
    """Median, least and most, as text."""
    return tuple(f"{value:.0f} ms" for value in (statistics.median(samples), min(samples), max(samples)))  # type: ignore[return-value]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of the prefix (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=6, metavar="N", help="rounds before (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="of per-token latency (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=["prefix", "tokens", "memory"], default=["prefix", "tokens", "memory"]
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a goal is missed")
    parser.add_argument("--memory-of", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print, write the JSON."""
    options = arguments()
    if why := refusal(options, needs_model=False):
        print(f"error: {why}", file=sys.stderr)
        return 2
    try:
        if options.memory_of:
            print(own_peak(options))
            return 0
        options.model = Path(options.model or demo_model("int4"))
        report: dict[str, Any] = {"model": options.model.name, "machine": ov_phi3.Machine.here().to_dict()}
        report["weight_bytes"] = ov_phi3.ModelInfo.from_dir(options.model).weight_bytes
        with tempfile.TemporaryDirectory() as folder:
            if "prefix" in options.only:
                report["prefix"] = saved_prefixes(options, Path(folder))
        if "tokens" in options.only:
            report["per_token_ms"] = per_token(options)
        if "memory" in options.only:
            report["peak_bytes"] = peak_memory(options)
    except (ov_phi3.Error, BootstrapError, subprocess.CalledProcessError) as error:
        progress("")
        print(f"error: {error}", file=sys.stderr)
        return 1
    progress("")
    report["goals"] = {goal.name: [goal.value, goal.most] for goal in goals(report)}
    print(f"{ov_phi3.Machine.here()}\n{options.model.name} on {options.device}\n\n{shown(report)}")
    if options.json:
        write_json(options.json, report)
    missed = not all(goal.met for goal in goals(report)) or not report.get("prefix", {}).get("equal_ids", True)
    return int(options.check and missed)


if __name__ == "__main__":
    exit_with(main)
