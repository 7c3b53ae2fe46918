"""Throughput of concurrent requests: tokens per second of several callers, compared with one caller.

    python benchmarks/concurrency.py MODEL [--device GPU.0] [--at-once 1 2 4 8] [--genai] [--json FILE]

One pipeline, loaded with ``concurrency=`` of the largest number of callers, answers requests from one thread and from
several threads. All settings alternate in every round, and a ratio compares figures of one round. A pipeline without
``concurrency=`` is measured too, to show the cost of the batching engine for a single caller. Every request has a fresh
prompt, so no request reuses cached tokens. ``--genai`` adds a pipeline that uses GenAI's continuous batching instead of
our own engine.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import (
    add_load_arguments,
    add_model_arguments,
    check,
    exit_with,
    load_options,
    measured_device,
    progress,
    write_json,
)


def replies(pipe: ov_phi3.Pipeline, prompts: list[Any], at_once: int, new_tokens: int) -> dict[str, Any]:
    """Generate replies from `at_once` threads; return tokens per second of all, and the median TTFT and TPOT."""

    def ask(prompt: Any) -> ov_phi3.GenerationResult:
        return pipe.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)

    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as callers:
        results = list(callers.map(ask, prompts))
    elapsed = time.perf_counter() - started
    return {
        "tokens_per_s": sum(len(result.token_ids) for result in results) / elapsed,
        "ttft_ms": statistics.median(result.metrics.ttft_ms or 0 for result in results),
        "tpot_ms": statistics.median(result.metrics.tpot_ms or 0 for result in results),
    }


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure all rounds; return the samples of each setting."""
    largest = max(options.at_once)
    settings: dict[str, tuple[str, int]] = {"plain": ("plain", 1), **{str(n): ("own", n) for n in options.at_once}}
    if options.genai:
        settings |= {f"{n}, GenAI's batching": ("genai", n) for n in options.at_once}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    load, rng = load_options(options), random.Random(0)
    with contextlib.ExitStack() as stack:
        pipes = {
            "plain": stack.enter_context(ov_phi3.load(options.model, **load)),
            "own": stack.enter_context(ov_phi3.load(options.model, concurrency=largest, **load)),
        }
        if options.genai:
            genai = ov_phi3.load(options.model, concurrency=largest, backend="llm_pipeline", **load)
            pipes["genai"] = stack.enter_context(genai)
        for number in range(-1, options.repeat):
            for name, (kind, at_once) in settings.items():
                progress(f"round {number + 1} of {options.repeat}: {name} at once")
                prompts = [ov_phi3.random_prompt(pipes[kind], options.prompt_tokens, rng) for _ in range(2 * largest)]
                sample = replies(pipes[kind], prompts, at_once, options.new_tokens)
                samples[name] += [sample] if number >= 0 else []
    return samples


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="GPU.0")
    add_load_arguments(parser)
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of concurrent callers"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--genai", action="store_true", help="measure GenAI's batching in the same run")
    options = parser.parse_args()
    if min(options.at_once) < 1 or max(options.at_once) < 2 or options.repeat < 1:
        parser.error("--at-once needs numbers of at least 1, one of them above 1, and --repeat at least 1")
    options.at_once = sorted({1, *options.at_once})
    check(options)
    samples = measure(options)
    progress("")
    device = measured_device(options)
    print(f"{options.model.name} on {device}, {options.prompt_tokens} + {options.new_tokens} tokens per request\n")
    print(f"{'callers':<24}{'tokens/s':>10}{'ratio to 1':>12}{'TTFT':>11}{'TPOT':>11}")
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
        print(f"{label:<24}{speed:>10.1f}{ratio:>12.2f}{ttft:>8.0f} ms{tpot:>8.1f} ms")
    if options.json:
        report = {"samples": samples, "tokens_per_s_over_one_caller": ratios}
        conditions = {"machine": ov_phi3.Machine.here().to_dict(), "device": asdict(device)}
        write_json(options.json, report | conditions)
    return 0


if __name__ == "__main__":
    exit_with(main)
