"""The cost of chat turns: time to first token (TTFT) over ten turns, and memory over 200 turns in a small window.

    python benchmarks/chat.py MODEL [--device GPU.0] [--repeat 5] [--turns 200] [--json FILE]

The ten turns have messages and replies of equal length and fresh content. The figure is the TTFT of turn 10 divided by
that of turn 2, the median of the conversations. It is above 1, since each new token attends to all preceding tokens.
The long conversation runs with ``overflow="drop_oldest"`` in a window of 512 tokens. The figure is the memory of the
process at the end divided by the memory after a tenth of the turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import add_load_arguments, add_model_arguments, check, exit_with, load_options, progress, write_json
from ov_phi3.bench.prompts import chat_message
from ov_phi3.system.memory import resident_memory_bytes


def long_chat(options: argparse.Namespace) -> dict[str, Any]:
    """Run a conversation that drops its oldest turns; return the memory after each turn and the prefilled tokens."""
    rng = random.Random(options.seed)
    with ov_phi3.load(options.model, **{**load_options(options), "context_length": 512}) as pipe:
        chat = pipe.chat(system="You are a helpful AI assistant.", overflow="drop_oldest")
        memory: list[int | None] = []
        drops = prefilled = prompts = 0
        for number in range(options.turns):
            progress(f"turn {number} of {options.turns}")
            result = chat.send(chat_message(rng), max_new_tokens=32, ignore_eos=True, do_sample=False)
            memory.append(resident_memory_bytes())
            drops += bool(result.dropped_messages)
            prompts += result.metrics.prompt_tokens
            prefilled += result.metrics.prompt_tokens - (result.metrics.reused_tokens or 0)
        early, late = memory[options.turns // 10], memory[-1]
        return {
            "turns": options.turns,
            "times_dropped": drops,
            "turns_dropped": chat.dropped_turns,
            "prompt_tokens": prompts,
            "prefilled": prefilled,
            "memory_bytes": memory,
            "memory_ratio": late / early if early and late else None,
        }


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    add_load_arguments(parser)
    parser.add_argument("--repeat", type=int, default=5, help="conversations of ten turns (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=200, help="turns of the long conversation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the messages (default: %(default)s)")
    options = parser.parse_args()
    check(options)
    with ov_phi3.load(options.model, **load_options(options)) as pipe:
        ten = {"prompt_tokens": (), "chat_turns": 10, "repeat": options.repeat, "roofline": False}
        report = ov_phi3.measure(pipe, **ten, seed=options.seed, progress=progress)
    long = long_chat(options)
    progress("")
    second, tenth = (report.chat[turn].samples for turn in (1, 9))
    ratio = statistics.median((b.ttft_ms or 0) / (a.ttft_ms or 1) for a, b in zip(second, tenth, strict=True))
    print(f"{report}\n\nTTFT of turn 10 / turn 2: {ratio:.2f}")
    print(
        f"{long['turns']} turns in 512 tokens: dropped {long['turns_dropped']} turns, {long['times_dropped']} times; "
        f"prefilled {long['prefilled']:,} of {long['prompt_tokens']:,} prompt tokens"
    )
    if long["memory_ratio"] is not None:
        print(f"Memory at the end / after a tenth of the turns: {long['memory_ratio']:.3f}")
    if options.json:
        write_json(options.json, {"report": report.to_dict(), "turn_10_over_turn_2": ratio, "long": long})
    return 0


if __name__ == "__main__":
    exit_with(main)
