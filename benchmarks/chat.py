"""What a chat's turns cost: time to first token over ten turns, and memory over two hundred in a small window.

    python benchmarks/chat.py MODEL [--device GPU.0] [--repeats 5] [--words 5] [--turns 200] [--json FILE]

The ten turns have messages and replies of equal length and fresh content; the figure is the first-token time of turn 10
over that of turn 2, the median of the repeats. It is not 1: each new token still attends to all before it, and the
longer the messages, the more that is. The long conversation runs with ``overflow="drop_oldest"`` in a window
of 512 tokens; the figure is the process's memory at its end over that after a tenth of it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ov_phi3

if TYPE_CHECKING:
    from ov_phi3 import Chat, GenerationResult

REPLY = 32


def message(draw: random.Random, words: int = 5) -> str:
    """A message that no cache has seen; numbers of two digits, so that all are of the same length in tokens."""
    return "Remember these: " + " ".join(str(draw.randrange(10, 100)) for _ in range(words))


def turn(chat: Chat, text: str) -> GenerationResult:
    """One turn of a fixed length."""
    return chat.send(text, max_new_tokens=REPLY, ignore_eos=True, do_sample=False)


def memory_bytes() -> int | None:
    """What of this process is in memory; None where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), None)


def ten_turns(pipe: ov_phi3.Pipeline, draw: random.Random, words: int) -> list[dict[str, Any]]:
    """One conversation of ten turns."""
    chat = pipe.chat(system=message(draw, 40))
    rows = []
    for number in range(1, 11):
        metrics = turn(chat, message(draw, words)).metrics
        rows.append(
            {
                "turn": number,
                "prompt_tokens": metrics.prompt_tokens,
                "prefilled": metrics.prompt_tokens - (metrics.reused_tokens or 0),
                "ttft_ms": metrics.ttft_ms,
            }
        )
    return rows


def long_chat(model: Path, device: str, draw: random.Random, turns: int) -> dict[str, Any]:
    """A conversation that drops its oldest turns, and the memory along it."""
    with ov_phi3.load(model, device=device, context_length=512) as pipe:
        chat = pipe.chat(system="You are a helpful AI assistant.", overflow="drop_oldest")
        memory: list[int | None] = []
        drops = prefilled = prompts = 0
        for _ in range(turns):
            result = turn(chat, message(draw))
            memory.append(memory_bytes())
            drops += bool(result.dropped_messages)
            prompts += result.metrics.prompt_tokens
            prefilled += result.metrics.prompt_tokens - (result.metrics.reused_tokens or 0)
        early, late = memory[turns // 10], memory[-1]
        return {
            "turns": turns,
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
    parser.add_argument("model", type=Path, help="an exported model")
    parser.add_argument("--device", default="AUTO")
    parser.add_argument("--repeats", type=int, default=5, help="conversations of ten turns; default: 5")
    parser.add_argument("--words", type=int, default=5, help="numbers in a message of the ten turns; default: 5")
    parser.add_argument("--turns", type=int, default=200, help="turns of the long conversation; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of the messages; default: 0")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    try:
        with ov_phi3.load(options.model, device=options.device) as pipe:
            ten_turns(pipe, draw, options.words)  # memory and kernels that nobody has used yet
            conversations = [ten_turns(pipe, draw, options.words) for _ in range(options.repeats)]
        long = long_chat(options.model, options.device, draw, options.turns)
    except ov_phi3.Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'turn':>4}{'prompt':>9}{'prefilled':>11}{'TTFT':>11}")
    for rows in zip(*conversations, strict=True):
        ttft = statistics.median(row["ttft_ms"] for row in rows)
        print(f"{rows[0]['turn']:>4}{rows[0]['prompt_tokens']:>9}{rows[0]['prefilled']:>11}{ttft:>8.1f} ms")
    ratio = statistics.median(rows[9]["ttft_ms"] / rows[1]["ttft_ms"] for rows in conversations)
    print(f"Turn 10 over turn 2: {ratio:.2f}")
    print(
        f"\n{long['turns']} turns in 512 tokens: dropped {long['turns_dropped']} turns, {long['times_dropped']} times; "
        f"prefilled {long['prefilled']:,} of {long['prompt_tokens']:,} prompt tokens"
    )
    if long["memory_ratio"] is not None:
        print(f"Memory at the end over that after a tenth of the turns: {long['memory_ratio']:.3f}")
    if options.json:
        report = {"ten_turns": conversations, "turn_10_over_turn_2": ratio, "long": long}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
