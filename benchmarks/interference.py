"""What a prompt that arrives does to what runs already: gaps of a running reply, and of the event loop.

    python benchmarks/interference.py MODEL [--device GPU.0] [--prompt-tokens 1024] [--repeat 20] [--json FILE]

A reply runs alone, and then again while a prompt arrives. The gaps between its tokens while that prompt is prefilled
are divided by the time per token (TPOT) of the replies that ran alone. Then four prompts are sent at once from an event
loop in which a heartbeat sleeps for a millisecond again and again. A gap of the heartbeat is how much later than asked
it woke up: by then every other task of the program was held up as well. One pipeline with ``concurrency=8`` on the
backend `infer_request` answers everything. No prompt begins with tokens that are cached.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
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

BEFORE, RUNNING = 16, 512
"""Tokens of the running reply before the prompt arrives, and in all."""
BEAT_S = 0.001


def gaps_beside_a_prompt(pipe: ov_phi3.Pipeline, tokens: int, rng: random.Random) -> tuple[list[float], list[float]]:
    """Milliseconds between tokens of a reply: before a prompt arrives, and from then until its prefill has ended."""
    options: dict[str, Any] = {"ignore_eos": True, "do_sample": False}
    alone: list[float] = []
    beside: list[float] = []
    running = pipe.stream(ov_phi3.random_prompt(pipe, 32, rng), max_new_tokens=RUNNING, **options)
    arrived: ov_phi3.TokenStream | None = None
    before = 0.0
    with running:
        for number, chunk in enumerate(running):
            stamp = time.perf_counter()
            if number > 1:
                (alone if arrived is None else beside).append((stamp - before) * 1000)
            before = stamp
            if number == BEFORE:
                prompt = ov_phi3.random_prompt(pipe, tokens, rng)
                arrived = pipe.stream(prompt, max_new_tokens=1, **options)
                before = time.perf_counter()
            if (arrived is not None and arrived.done) or not chunk.token_ids:
                break
    if arrived is not None:
        arrived.cancel()
    return alone, beside


async def heartbeat_gaps(pipe: ov_phi3.Pipeline, tokens: int, rng: random.Random) -> list[float]:
    """Milliseconds by which a heartbeat of 1 ms woke up late while four prompts of `tokens` were answered."""
    late: list[float] = []

    async def beat() -> None:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(BEAT_S)
            late.append((time.perf_counter() - asked - BEAT_S) * 1000)

    heart = asyncio.create_task(beat())
    prompts = [ov_phi3.random_prompt(pipe, tokens, rng) for _ in range(4)]

    async def read(prompt: Any) -> None:
        async for _ in pipe.stream(prompt, max_new_tokens=16, ignore_eos=True, do_sample=False):
            pass

    await asyncio.gather(*map(read, prompts))
    heart.cancel()
    return late


def percentile(values: list[float], part: float) -> float:
    """The value that this part of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """All samples in milliseconds; the first round, which prepares kernels, is left out."""
    rng = random.Random(options.seed)
    samples: dict[str, list[float]] = {"alone": [], "beside a prompt": [], "heartbeat": []}
    with ov_phi3.load(options.model, backend="infer_request", concurrency=8, **load_options(options)) as pipe:
        for number in range(-1, options.repeat):
            progress(f"round {number + 1} of {options.repeat}")
            alone, beside = gaps_beside_a_prompt(pipe, options.prompt_tokens, rng)
            late = asyncio.run(heartbeat_gaps(pipe, options.heartbeat_tokens, rng))
            if number >= 0:
                samples["alone"] += alone
                samples["beside a prompt"] += beside
                samples["heartbeat"] += late
    return samples


def main() -> int:
    """Measure, print the gaps, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="GPU.0")
    add_load_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--heartbeat-tokens", type=int, default=750, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=20, help="rounds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args()
    check(options)
    samples = measure(options)
    progress("")
    device = measured_device(options)
    print(f"{options.model.name} on {device}, {options.repeat} rounds\n")
    print(f"{'':<36}{'number':>8}{'median':>11}{'p99':>11}{'largest':>11}")
    labels = {
        "alone": "gap of a reply alone",
        "beside a prompt": f"gap beside {options.prompt_tokens} tokens of prompt",
        "heartbeat": f"heartbeat late, 4 prompts of {options.heartbeat_tokens}",
    }
    for key, values in samples.items():
        figures = (statistics.median(values), percentile(values, 0.99), max(values))
        print(f"{labels[key]:<36}{len(values):>8}" + "".join(f"{figure:>8.1f} ms" for figure in figures))
    tpot = statistics.median(samples["alone"])
    beside = samples["beside a prompt"]
    ratios = {"median": statistics.median(beside) / tpot, "p99": percentile(beside, 0.99) / tpot}
    print(f"\nbeside a prompt over alone: median {ratios['median']:.2f}, p99 {ratios['p99']:.2f}")
    if options.json:
        conditions = {"machine": ov_phi3.Machine.here().to_dict(), "device": asdict(device)}
        write_json(options.json, {"samples": samples, "over_tpot_alone": ratios, **conditions})
    return 0


if __name__ == "__main__":
    exit_with(main)
