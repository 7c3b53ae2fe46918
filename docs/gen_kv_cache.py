"""Draw `kv-cache.svg` from the library's own books: `python docs/gen_kv_cache.py`.

The lengths are made up; what is found in the cache at each step is what `BlockLedger` says, so the picture changes with
the rules. `tests/test_docs.py` fails while the picture and the code differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ov_phi3.engine.runner import Generator
from ov_phi3.kv.cache import BlockLedger

PICTURE = Path(__file__).with_name("kv-cache.svg")
BLOCK = 32
SYSTEM, MESSAGE, REPLY = 38, 24, 42
BOUNDARY = 288

LEFT, TOP, ROW, BAR, SCALE = 176, 62, 40, 20, 1.85
REUSED, PREFILLED, GENERATED, INK, FAINT = "#2e9e6b", "#e08a1e", "#3b7dd8", "#6b7280", "#9ca3af"


@dataclass(frozen=True)
class Step:
    """One turn: what its prompt found, what was prefilled, and what was generated."""

    name: str
    reused: int
    prompt: int
    total: int
    again: int = 0  # computed a second time within the reply


class Conversation:
    """Ids made up on the way, and one cache for all of them."""

    def __init__(self) -> None:
        self.ledger = BlockLedger(BLOCK, 1000)
        self.generator = Generator(ledger=self.ledger, rope_boundary=BOUNDARY)
        self._next = 0

    def fresh(self, count: int) -> list[int]:
        """Ids that nobody has had before."""
        self._next += count
        return list(range(self._next - count, self._next))

    def turn(self, name: str, history: list[int]) -> tuple[Step, list[int]]:
        """Say something after a history; returns the step and the history after it."""
        prompt = [*history, *self.fresh(MESSAGE)]
        reply = self.fresh(REPLY)
        ids = np.array(prompt, dtype=np.int64)
        salt = self.generator._salt(len(prompt) > BOUNDARY)
        reused = self.ledger.find(ids, salt)
        room = self.generator.reply_room(len(prompt))
        first = reply if room is None or room >= len(reply) else reply[:room]
        self.ledger.record(ids, first[:-1], longest=len(first), exact=True, salt=salt)
        again = 0
        if len(first) < len(reply):
            whole = np.array([*prompt, *first], dtype=np.int64)
            past = self.generator._salt(True)
            again = len(whole) - self.ledger.find(whole, past)
            self.ledger.record(whole, reply[len(first) : -1], longest=len(reply), exact=True, salt=past)
        return Step(name, reused, len(prompt), len(prompt) + len(reply), again), [*prompt, *reply]


def steps() -> list[Step]:
    """A conversation that is rewound and forked, and then grows past the boundary."""
    talk = Conversation()
    done: list[Step] = []
    histories = [talk.fresh(SYSTEM)]
    for number in (1, 2, 3):
        step, history = talk.turn(f"turn {number}", histories[-1])
        done.append(step)
        histories.append(history)
    step, branch = talk.turn("rewind(1), again", histories[2])
    done.append(step)
    step, _ = talk.turn("fork(): one branch", branch)
    done.append(step)
    step, history = talk.turn("the other branch", branch)
    done.append(step)
    step, _ = talk.turn("its next turn", history)
    done.append(step)
    return done


def bar(x: float, y: float, tokens: float, colour: str) -> str:
    """A stretch of tokens."""
    return f'<rect x="{x:.1f}" y="{y}" width="{tokens * SCALE:.1f}" height="{BAR}" fill="{colour}"/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, fill: str = INK) -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def drawn(done: list[Step]) -> str:
    """The picture."""
    longest = max(step.total for step in done)
    width, height = LEFT + longest * SCALE + 170, TOP + ROW * len(done) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'font-family="system-ui, sans-serif" aria-label="What each turn of a chat takes from the KV cache">'
    ]
    x: float = LEFT
    for colour, words in (
        (REUSED, "from the cache"),
        (PREFILLED, "prefilled"),
        (GENERATED, "generated"),
    ):
        out += [f'<rect x="{x}" y="14" width="14" height="14" fill="{colour}"/>', text(x + 20, 26, words)]
        x += 150
    for block in range(0, longest + BLOCK, BLOCK):
        place = LEFT + block * SCALE
        out.append(
            f'<line x1="{place:.1f}" y1="{TOP - 6}" x2="{place:.1f}" y2="{TOP + ROW * len(done) - 12}" '
            f'stroke="{FAINT}" stroke-opacity="0.35"/>'
        )
        if block % (2 * BLOCK) == 0:
            out.append(text(place, TOP - 12, str(block), anchor="middle", size=11, fill=FAINT))
    place = LEFT + BOUNDARY * SCALE
    low = TOP + ROW * len(done) - 4
    out += [
        f'<line x1="{place:.1f}" y1="{TOP - 6}" x2="{place:.1f}" y2="{low}" stroke="{INK}" stroke-dasharray="5 4"/>',
        text(place, low + 16, "LongRoPE boundary of this example", anchor="middle", size=12),
    ]
    for row, step in enumerate(done):
        y = TOP + ROW * row
        out += [
            text(LEFT - 12, y + 15, step.name, anchor="end"),
            bar(LEFT, y, step.reused, REUSED),
            bar(LEFT + step.reused * SCALE, y, step.prompt - step.reused, PREFILLED),
            bar(LEFT + step.prompt * SCALE, y, step.total - step.prompt, GENERATED),
        ]
        cost = f"{step.prompt - step.reused} to prefill"
        if step.again:
            stretch = bar(LEFT + (BOUNDARY + 1 - step.again) * SCALE, y + BAR + 2, step.again, PREFILLED)
            out.append(stretch.replace(f'height="{BAR}"', 'height="6"'))
            cost += f", {step.again} again"
        out.append(text(LEFT + step.total * SCALE + 8, y + 15, cost, size=12))
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn(steps()), encoding="utf-8")
