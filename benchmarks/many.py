"""Throughput of `generate_many`, compared with one request after another.

    python benchmarks/many.py MODEL [--device GPU.0] [--prompts 200] [--concurrency 16] [--repeat 3] [--json FILE]

Both run in every round, on pipelines with the same settings, and a ratio compares figures of one round. Every prompt is
fresh, so nothing comes from the cache.
"""

from __future__ import annotations

import argparse
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


def tokens_per_s(pipe: ov_phi3.Pipeline, prompts: list[Any], new_tokens: int, *, many: bool) -> float:
    """Tokens per second of all replies."""
    how: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True, "do_sample": False}
    started = time.perf_counter()
    if many:
        tokens = sum(len(outcome.token_ids) for outcome in pipe.generate_many(prompts, **how).results())  # type: ignore[union-attr]
    else:
        tokens = sum(len(pipe.generate(prompt, **how).token_ids) for prompt in prompts)
    return tokens / (time.perf_counter() - started)


def main() -> int:
    """Measure, print the ratio, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="GPU.0")
    add_load_arguments(parser)
    parser.add_argument("--prompts", type=int, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: %(default)s)")
    options = parser.parse_args()
    if options.prompts < 1 or options.concurrency < 2 or options.repeat < 1:
        parser.error("--prompts and --repeat need at least 1, --concurrency at least 2")
    check(options)
    load, rng = load_options(options), random.Random(0)
    samples: list[dict[str, float]] = []
    with (
        ov_phi3.load(options.model, **{"backend": "infer_request", **load}) as one,
        ov_phi3.load(options.model, concurrency=options.concurrency, **load) as pipe,
    ):
        for loaded in (one, pipe):
            loaded.warmup()
        for number in range(options.repeat):
            progress(f"round {number + 1} of {options.repeat}")
            prompts = [ov_phi3.random_prompt(one, options.prompt_tokens, rng) for _ in range(2 * options.prompts)]
            halves = (prompts[: options.prompts], prompts[options.prompts :])
            alone = tokens_per_s(one, halves[0], options.new_tokens, many=False)
            samples.append({"alone": alone, "many": tokens_per_s(pipe, halves[1], options.new_tokens, many=True)})
    progress("")
    device = measured_device(options)
    ratio = statistics.median(sample["many"] / sample["alone"] for sample in samples)
    print(f"{options.model.name} on {device}, {options.prompts} prompts of {options.prompt_tokens} tokens\n")
    for name, title in (("alone", "one after another"), ("many", f"generate_many, {options.concurrency} at once")):
        print(f"{title:<30}{statistics.median(sample[name] for sample in samples):>10.1f} tokens/s")
    print(f"{'ratio, median of rounds':<30}{ratio:>10.2f}")
    if options.json:
        conditions = {"machine": ov_phi3.Machine.here().to_dict(), "device": asdict(device)}
        write_json(options.json, {"samples": samples, "ratio": ratio} | conditions)
    return 0


if __name__ == "__main__":
    exit_with(main)
