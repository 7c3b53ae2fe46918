"""Throughput of concurrent requests: tokens per second of several callers, compared with one caller.

    python benchmarks/concurrency.py MODEL [--device GPU.0] [--at-once 1 2 4 8] [--genai] [--json FILE]

One pipeline, loaded with ``concurrency=`` of the largest number of callers, answers requests from one thread and from
several threads. All settings alternate in every round, and a ratio compares figures of one round. A pipeline without
``concurrency=`` is measured too, to show the cost of the batching engine for a single caller. Every request has a fresh
prompt, so no request reuses cached tokens.

``--genai`` adds raw ``openvino_genai.ContinuousBatchingPipeline`` in its best case, with the same properties and as
large a cache: a call of ``generate`` has as many requests as there are callers, which begin and end together, and it
hands over whole replies.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeAlias

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import numpy as np

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
from ov_phi3.backends.llm_pipeline import with_scheduler

Ask: TypeAlias = Callable[[list[list[int]]], dict[str, Any]]
"""Gets the replies to some prompts; returns a sample: tokens per second of all, and their median TTFT and TPOT."""


def replies(pipe: ov_phi3.Pipeline, at_once: int, new_tokens: int, prompts: list[list[int]]) -> dict[str, Any]:
    """A sample of replies that `at_once` threads ask for."""

    def ask(prompt: list[int]) -> ov_phi3.GenerationResult:
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


def genai_replies(raw: Any, at_once: int, new_tokens: int, prompts: list[list[int]]) -> dict[str, Any]:
    """A sample of replies of raw GenAI: calls of `generate` with `at_once` prompts each, one after another.

    All replies of a call are equally long, so no place in a step stays empty. `SchedulerConfig.max_num_seqs`, which
    would do the same in one call, has no effect on GenAI's default scheduling (2026.4.1).
    """
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
    tensors = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
    whole = len(tensors) - len(tensors) % at_once
    calls = [tensors[first : first + at_once] for first in range(0, whole, at_once)]
    started = time.perf_counter()
    results = [result for call in calls for result in raw.generate(call, [config] * len(call))]
    elapsed = time.perf_counter() - started
    return {"tokens_per_s": sum(len(result.m_generation_ids[0]) for result in results) / elapsed}


def open_genai(pipe: ov_phi3.Pipeline) -> Any:
    """Raw GenAI with properties and cache of a loaded pipeline, without a prefix cache."""
    import openvino_genai

    properties = with_scheduler(pipe.load_report.ov_config, pipe.engine.kv_plan)
    scheduler = properties.pop("scheduler_config")
    scheduler.enable_prefix_caching = False
    return openvino_genai.ContinuousBatchingPipeline(str(pipe.info.path), scheduler, pipe.device.name, properties)


def settings(options: argparse.Namespace, plain: ov_phi3.Pipeline, own: ov_phi3.Pipeline) -> dict[str, Ask]:
    """What is measured, by its name in the report."""
    asks = {"plain": functools.partial(replies, plain, 1, options.new_tokens)}
    asks |= {str(n): functools.partial(replies, own, n, options.new_tokens) for n in options.at_once}
    if options.genai:
        ask = functools.partial(genai_replies, open_genai(own))
        asks |= {f"{n}, GenAI's batching": functools.partial(ask, n, options.new_tokens) for n in options.at_once}
    return asks


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure all rounds; return the samples of each setting."""
    largest, load, rng = max(options.at_once), load_options(options), random.Random(0)
    requests = options.requests or 2 * largest
    with (
        ov_phi3.load(options.model, **load) as plain,
        ov_phi3.load(options.model, concurrency=largest, **load) as own,
    ):
        asks = settings(options, plain, own)
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in asks}
        for number in range(-1, options.repeat):
            for name, ask in asks.items():
                progress(f"round {number + 1} of {options.repeat}: {name} at once")
                sample = ask([ov_phi3.random_prompt(own, options.prompt_tokens, rng) for _ in range(requests)])
                samples[name] += [sample] if number >= 0 else []
    return samples


def ratio(samples: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Tokens per second of one setting over those of another: the median of the rounds."""
    return statistics.median(
        sample["tokens_per_s"] / other["tokens_per_s"] for sample, other in zip(samples, others, strict=True)
    )


def row(name: str, samples: list[dict[str, Any]], over_one: float) -> str:
    """A line of the table."""
    cells = []
    for key, width, places in (("tokens_per_s", 10, 1), ("ttft_ms", 8, 0), ("tpot_ms", 8, 1)):
        known = [sample[key] for sample in samples if key in sample]
        cells.append(f"{statistics.median(known):>{width}.{places}f}" if known else f"{'-':>{width}}")
    speed, ttft, tpot = cells
    label = "1, without concurrency=" if name == "plain" else name
    return f"{label:<24}{speed}{over_one:>12.2f}{ttft} ms{tpot} ms"


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
    parser.add_argument("--requests", type=int, metavar="N", help="in each setting (default: two of every caller)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--genai", action="store_true", help="measure GenAI's batching in the same run")
    options = parser.parse_args()
    if min(options.at_once) < 1 or max(options.at_once) < 2 or options.repeat < 1:
        parser.error("--at-once needs numbers of at least 1, one of them above 1, and --repeat at least 1")
    if options.requests is not None and options.requests < max(options.at_once):
        parser.error(f"--requests {options.requests}; expected at least one for each of {max(options.at_once)} callers")
    options.at_once = sorted({1, *options.at_once})
    check(options)
    samples = measure(options)
    progress("")
    device = measured_device(options)
    print(f"{options.model.name} on {device}, {options.prompt_tokens} + {options.new_tokens} tokens per request\n")
    print(f"{'callers':<24}{'tokens/s':>10}{'ratio to 1':>12}{'TTFT':>11}{'TPOT':>11}")
    over_one = {name: ratio(rows, samples["1"]) for name, rows in samples.items()}
    for name, rows in samples.items():
        print(row(name, rows, over_one[name]))
    numbers = options.at_once if options.genai else []
    over_genai = {n: ratio(samples[str(n)], samples[f"{n}, GenAI's batching"]) for n in numbers}
    for number, over in over_genai.items():
        print(f"{number} at once: {over:.2f} times the tokens per second of GenAI's batching")
    if options.json:
        report = {"samples": samples, "tokens_per_s_over_one_caller": over_one, "tokens_per_s_over_genai": over_genai}
        conditions = {"machine": ov_phi3.Machine.here().to_dict(), "device": asdict(device)}
        write_json(options.json, report | conditions)
    return 0


if __name__ == "__main__":
    exit_with(main)
