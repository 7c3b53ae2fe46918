"""Check what is said about the prefix cache against the clock.

``metrics.reused_tokens`` is reckoned by the engine's rules, since the engine does not tell. Here each figure is held
against the time that the prefill took: chats go through everything that a conversation can, and the tokens that the
measured time stands for are compared with those that were reckoned. The clock is set with prompts that share whole
blocks with an earlier one, the simplest case. It also measures what prefilling in pieces costs, as a ratio.

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

BLOCK = 32  # prompts are made to share multiples of this; a multiple of every device's block
REPLY = 24


@dataclass(frozen=True)
class Case:
    """One prefill: what was reckoned, and what the clock says."""

    name: str
    prompt_tokens: int
    reckoned: int  # tokens to prefill, by reused_tokens
    milliseconds: float
    measured: float  # tokens to prefill, by the time


def by_the_clock(pipe: Pipeline, draw: random.Random, repeats: int, case: tuple[int, int], spent: float) -> float:
    """How many tokens a prefill of this time stands for.

    Prompts of the same length that share whole blocks with an earlier one, some fewer and some more than was reckoned,
    give times; between them it is a straight line.
    """
    prompt, reckoned = case
    shared = round((prompt - reckoned) / BLOCK) * BLOCK
    points = []
    for cached in sorted({min(max(0, shared + BLOCK * step), prompt - 1) for step in (-2, -1, 0, 1, 2)}, reverse=True):
        times = []
        for _ in range(repeats):
            ids = ov_phi3.random_prompt(pipe, prompt, draw)
            if cached:
                pipe.generate(ids[:cached], max_new_tokens=1, ignore_eos=True, do_sample=False)
            times.append(first_token_ms(pipe.generate(ids, max_new_tokens=1, ignore_eos=True, do_sample=False)))
        points.append((statistics.median(times), prompt - cached))
    slope, at_zero = statistics.linear_regression([p[0] for p in points], [p[1] for p in points])
    return slope * spent + at_zero


def words(draw: random.Random, count: int) -> str:
    """A message of about so many tokens, which no cache has seen."""
    return " ".join(str(draw.randrange(10, 100)) for _ in range(count // 3))


def first_token_ms(result: GenerationResult) -> float:
    """Time to first token by the engine's clock."""
    assert result.metrics.engine_ttft_ms is not None
    return result.metrics.engine_ttft_ms


def conversations(pipe: Pipeline, draw: random.Random) -> Iterator[tuple[str, GenerationResult]]:
    """Everything that a conversation can go through, each turn with a name."""

    def turn(chat: Chat, tokens: int = 90) -> GenerationResult:
        return chat.send(words(draw, tokens), max_new_tokens=REPLY, ignore_eos=True, do_sample=False)

    chat = pipe.chat(system=words(draw, 200))
    for number in range(1, 6):
        yield f"turn {number}", turn(chat)
    chat.rewind(2)
    yield "after rewind(2)", turn(chat)
    left, right = chat.fork(), chat
    yield "left branch of a fork", turn(left)
    yield "right branch of a fork", turn(right)
    others = [pipe.chat(system=words(draw, 100)) for _ in range(3)]
    for other in others:
        yield "another chat, turn 1", turn(other)
    for other in draw.sample(others, 3):
        yield "another chat, turn 2", turn(other)
    yield "the first chat again", turn(left)
    for _ in left.stream(words(draw, 60), ignore_eos=True):
        break
    yield "after a cancelled reply", turn(left)
    yield "a short message", turn(left, 6)


def pieces(whole: Pipeline, chunked: Pipeline, draw: random.Random, repeats: int, tokens: int) -> float:
    """Time to first token in pieces over that of the whole prompt at once, median of pairs in random order."""
    ratios = []
    for _ in range(repeats):
        times = {}
        for pipe in draw.sample([whole, chunked], 2):
            ids = ov_phi3.random_prompt(pipe, tokens, draw)
            result = pipe.generate(ids, max_new_tokens=1, ignore_eos=True, do_sample=False)
            times[pipe] = result.metrics.ttft_ms or 0.0
        ratios.append(times[chunked] / times[whole])
    return statistics.median(ratios)


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported model")
    parser.add_argument("--device", default="AUTO")
    parser.add_argument("--repeats", type=int, default=5, help="prompts per length; default: 5")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; default: 0")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    try:
        with ov_phi3.load(options.model, device=options.device, prefill_chunk=0) as pipe:
            pipe.warmup()
            turns = []
            pipe.generate(
                ov_phi3.random_prompt(pipe, 1024, draw), max_new_tokens=8
            )  # memory and kernels that warmup() has not met
            for name, result in conversations(pipe, draw):
                metrics = result.metrics
                tokens = (metrics.prompt_tokens, metrics.prompt_tokens - (metrics.reused_tokens or 0))
                turns.append((name, tokens, first_token_ms(result)))
            cases = [
                Case(name, *tokens, spent, by_the_clock(pipe, draw, options.repeats, tokens, spent))
                for name, tokens, spent in turns
            ]
            with ov_phi3.load(options.model, device=options.device) as chunked:
                chunked.warmup()
                ratios = {n: pieces(pipe, chunked, draw, options.repeats, n) for n in (4096, 6144)}
    except ov_phi3.Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'':<24}{'prompt':>8}{'to prefill':>12}{'TTFT':>10}{'by the clock':>14}")
    for case in cases:
        print(
            f"{case.name:<24}{case.prompt_tokens:>8}{case.reckoned:>12}{case.milliseconds:>7.1f} ms"
            f"{case.measured:>14.0f}"
        )
    off = statistics.median(abs(case.measured - case.reckoned) for case in cases)
    print(f"\nMedian difference between the books and the clock: {off:.0f} tokens.")
    for tokens, ratio in ratios.items():
        print(f"Prefill of {tokens} tokens in pieces, over all at once: {ratio:.3f}")
    if options.json:
        report = {"cases": [asdict(case) for case in cases], "pieces": ratios}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
