"""Check the estimates of prefix reuse against measured prefill time.

The engine does not report how many tokens it takes from its prefix cache, so ``metrics.reused_tokens`` is an estimate
by the engine's rules. This script runs chats through turns, rewinds, forks and cancellations. For each request it
derives the number of prefilled tokens from the measured time, and compares it with the estimate. Prompts that share
complete blocks with an earlier prompt, the simplest case, calibrate the time. The script also measures the cost of
prefilling in chunks, as a ratio.

    python benchmarks/prefix_cache.py MODEL [--device GPU.0] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ov_phi3

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ov_phi3 import Chat, GenerationResult, Pipeline

BLOCK = 32  # calibration prompts share multiples of this; a multiple of every device's block size
REPLY = 24


@dataclass(frozen=True)
class Case:
    """One request: the estimated and the measured number of prefilled tokens.

    Attributes:
        name: description of the request.
        prompt_tokens: length of the prompt.
        estimated: tokens to prefill by `metrics.reused_tokens`.
        milliseconds: measured time to first token.
        measured: tokens to prefill by the measured time.
    """

    name: str
    prompt_tokens: int
    estimated: int
    milliseconds: float
    measured: float


def tokens_by_time(
    pipe: Pipeline, rng: random.Random, repeats: int, prompt_tokens: int, estimated: int, milliseconds: float
) -> float:
    """The number of prefilled tokens that a measured time corresponds to.

    Calibrates with prompts of the same length that share complete blocks with an earlier prompt, from two blocks below
    to two blocks above the estimate, and interpolates linearly between them.
    """
    shared = round((prompt_tokens - estimated) / BLOCK) * BLOCK
    lengths = {min(max(0, shared + BLOCK * step), prompt_tokens - 1) for step in (-2, -1, 0, 1, 2)}
    points = []
    for cached in sorted(lengths, reverse=True):
        times = []
        for _ in range(repeats):
            ids = ov_phi3.random_prompt(pipe, prompt_tokens, rng)
            if cached:
                pipe.generate(ids[:cached], max_new_tokens=1, ignore_eos=True, do_sample=False)
            times.append(first_token_ms(pipe.generate(ids, max_new_tokens=1, ignore_eos=True, do_sample=False)))
        points.append((statistics.median(times), prompt_tokens - cached))
    slope, intercept = statistics.linear_regression([p[0] for p in points], [p[1] for p in points])
    return slope * milliseconds + intercept


def words(rng: random.Random, tokens: int) -> str:
    """A random message of about `tokens` tokens, which no cache holds."""
    return " ".join(str(rng.randrange(10, 100)) for _ in range(tokens // 3))


def first_token_ms(result: GenerationResult) -> float:
    """Time to first token by the engine's clock, milliseconds."""
    assert result.metrics.engine_ttft_ms is not None
    return result.metrics.engine_ttft_ms


def conversations(pipe: Pipeline, rng: random.Random) -> Iterator[tuple[str, GenerationResult]]:
    """Run chats through every operation on a conversation; yield the name and the result of each turn."""

    def turn(chat: Chat, tokens: int = 90) -> GenerationResult:
        return chat.send(words(rng, tokens), max_new_tokens=REPLY, ignore_eos=True, do_sample=False)

    chat = pipe.chat(system=words(rng, 200))
    for number in range(1, 6):
        yield f"turn {number}", turn(chat)
    chat.rewind(2)
    yield "after rewind(2)", turn(chat)
    left, right = chat.fork(), chat
    yield "left branch of a fork", turn(left)
    yield "right branch of a fork", turn(right)
    others = [pipe.chat(system=words(rng, 100)) for _ in range(3)]
    for other in others:
        yield "another chat, turn 1", turn(other)
    for other in rng.sample(others, 3):
        yield "another chat, turn 2", turn(other)
    yield "the first chat again", turn(left)
    for _ in left.stream(words(rng, 60), ignore_eos=True):
        break
    yield "after a cancelled reply", turn(left)
    yield "a short message", turn(left, 6)


def chunk_ratio(whole: Pipeline, chunked: Pipeline, rng: random.Random, repeats: int, tokens: int) -> float:
    """TTFT of a prefill in chunks divided by that of a prefill at once, median of pairs in random order."""
    ratios = []
    for _ in range(repeats):
        times = {}
        for pipe in rng.sample([whole, chunked], 2):
            ids = ov_phi3.random_prompt(pipe, tokens, rng)
            result = pipe.generate(ids, max_new_tokens=1, ignore_eos=True, do_sample=False)
            times[pipe] = result.metrics.ttft_ms or 0.0
        ratios.append(times[chunked] / times[whole])
    return statistics.median(ratios)


def check_estimates(pipe: Pipeline, rng: random.Random, repeats: int) -> list[Case]:
    """Run the conversations, then calibrate each request."""
    pipe.warmup()
    # Allocates memory and compiles kernels that warmup() does not reach.
    pipe.generate(ov_phi3.random_prompt(pipe, 1024, rng), max_new_tokens=8)
    turns = []
    for name, result in conversations(pipe, rng):
        metrics = result.metrics
        estimated = metrics.prompt_tokens - (metrics.reused_tokens or 0)
        turns.append((name, metrics.prompt_tokens, estimated, first_token_ms(result)))
    return [Case(name, *turn, tokens_by_time(pipe, rng, repeats, *turn)) for name, *turn in turns]


def show(cases: list[Case], ratios: dict[int, float]) -> None:
    """Print the table of cases and the ratios."""
    print(f"{'':<24}{'prompt':>8}{'estimated':>12}{'TTFT':>10}{'measured':>12}")
    for case in cases:
        print(
            f"{case.name:<24}{case.prompt_tokens:>8}{case.estimated:>12}{case.milliseconds:>7.1f} ms"
            f"{case.measured:>12.0f}"
        )
    difference = statistics.median(abs(case.measured - case.estimated) for case in cases)
    print(f"\nTokens to prefill, estimated and measured: median difference {difference:.0f} tokens.")
    for tokens, ratio in ratios.items():
        print(f"Prefill of {tokens} tokens, in chunks / at once: {ratio:.3f}")


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of an exported model")
    parser.add_argument("--device", default="AUTO")
    parser.add_argument("--repeats", type=int, default=5, help="prompts per length (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    try:
        with ov_phi3.load(options.model, device=options.device, prefill_chunk=0) as pipe:
            device = pipe.device
            cases = check_estimates(pipe, rng, options.repeats)
            with ov_phi3.load(options.model, device=options.device) as chunked:
                chunked.warmup()
                ratios = {n: chunk_ratio(pipe, chunked, rng, options.repeats, n) for n in (4096, 6144)}
    except ov_phi3.Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{Path(options.model).name} on {device}\n")
    show(cases, ratios)
    if options.json:
        report = {"device": asdict(device), "cases": [asdict(case) for case in cases], "chunk_ratios": ratios}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
