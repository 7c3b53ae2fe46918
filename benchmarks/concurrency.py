"""What several requests at once give: tokens per second of four callers, beside one after another.

    python benchmarks/concurrency.py MODEL [--device GPU.0] [--at-once 1 2 4 8] [--repeat 3] [--json FILE]

One pipeline, loaded with ``concurrency=`` of the largest number, answers requests from one thread and from several, in
turn; each ratio is of one round. A pipeline without it is measured in every round too: what the batching engine costs a
single caller. Every request has a prompt of its own, so nothing is found in the cache.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import add_load_arguments, add_model_arguments, exit_with, load_options, progress, refusal, write_json


def replies(pipe: ov_phi3.Pipeline, prompts: list[Any], at_once: int, new_tokens: int) -> dict[str, Any]:
    """Answer the prompts by so many callers; gives tokens per second of all, and each reply's TTFT and TPOT."""

    def ask(prompt: Any) -> ov_phi3.GenerationResult:
        return pipe.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)

    begun = time.perf_counter()
    with ThreadPoolExecutor(at_once) as callers:
        found = list(callers.map(ask, prompts))
    took = time.perf_counter() - begun
    return {
        "tokens_per_s": sum(len(result.token_ids) for result in found) / took,
        "ttft_ms": statistics.median(result.metrics.ttft_ms or 0 for result in found),
        "tpot_ms": statistics.median(result.metrics.tpot_ms or 0 for result in found),
    }


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The samples of each setting, in the order of the rounds."""
    most = max(options.at_once)
    samples: dict[str, list[dict[str, Any]]] = {"plain": [], **{str(n): [] for n in options.at_once}}
    given, draw = load_options(options), random.Random(0)
    with (
        ov_phi3.load(options.model, **given) as plain,
        ov_phi3.load(options.model, concurrency=most, **given) as pipe,
    ):
        for number in range(-1, options.repeat):
            for name in samples:
                progress(f"round {number + 1} of {options.repeat}: {name} at once")
                prompts = [ov_phi3.random_prompt(plain, options.prompt_tokens, draw) for _ in range(2 * most)]
                at_once = 1 if name == "plain" else int(name)
                one = replies(plain if name == "plain" else pipe, prompts, at_once, options.new_tokens)
                samples[name] += [one] if number >= 0 else []
    return samples


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="GPU.0")
    add_load_arguments(parser)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of callers")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: %(default)s)")
    options = parser.parse_args()
    if min(options.at_once) < 1 or max(options.at_once) < 2 or options.repeat < 1:
        parser.error("--at-once needs numbers from 1 on, one of them above 1, and --repeat at least 1")
    options.at_once = sorted({1, *options.at_once})
    if problem := refusal(options):
        print(f"concurrency.py: {problem}", file=sys.stderr)
        return 2
    try:
        samples = measure(options)
    except ov_phi3.Error as error:
        print(f"concurrency.py: {error}", file=sys.stderr)
        return 1
    finally:
        progress("")
    print(f"{options.model.name} on {options.device}, {options.prompt_tokens} + {options.new_tokens} tokens each\n")
    print(f"{'callers':<24}{'tokens/s':>10}{'over one':>10}{'TTFT':>11}{'TPOT':>11}")
    ratios = {}
    for name, rows in samples.items():
        ratio = statistics.median(
            row["tokens_per_s"] / one["tokens_per_s"] for row, one in zip(rows, samples["1"], strict=True)
        )
        ratios[name] = ratio
        speed, ttft, tpot = (
            statistics.median(row[key] for row in rows) for key in ("tokens_per_s", "ttft_ms", "tpot_ms")
        )
        label = "1, without concurrency=" if name == "plain" else name
        print(f"{label:<24}{speed:>10.1f}{ratio:>10.2f}{ttft:>8.0f} ms{tpot:>8.1f} ms")
    if options.json:
        machine = ov_phi3.Machine.here().to_dict()
        write_json(options.json, {"samples": samples, "tokens_per_s_over_one_caller": ratios, "machine": machine})
    return 0


if __name__ == "__main__":
    exit_with(main)
