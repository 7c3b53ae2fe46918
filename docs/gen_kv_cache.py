"""Draw `kv-cache.svg` from the library's own prefix index: `python docs/gen_kv_cache.py`.

The lengths are an example. The number of reused tokens at each step is the estimate of `BlockLedger`, so the picture
changes with its rules. `tests/project/test_docs.py` fails while the picture and the code differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ov_phi3.engine.longrope import LongRope
from ov_phi3.kv.prefix_index import BlockLedger

PICTURE = Path(__file__).with_name("kv-cache.svg")
BLOCK = 32
SYSTEM, MESSAGE, REPLY = 38, 24, 42
BOUNDARY = 288

LEFT, TOP, ROW, BAR, SCALE = 165, 66, 42, 22, 1.2
RIGHT = 200  # width of the column with the costs
REUSED, PREFILLED, GENERATED, INK, FAINT = "#2e9e6b", "#e08a1e", "#3b7dd8", "#6b7280", "#9ca3af"


@dataclass(frozen=True)
class Step:
    """The token counts of one chat turn.

    Attributes:
        name: label of the row.
        reused: prompt tokens that were cached.
        prompt: tokens of the prompt.
        total: tokens of the prompt and the reply.
        recomputed: tokens computed again when the reply crossed the LongRoPE boundary.
    """

    name: str
    reused: int
    prompt: int
    total: int
    recomputed: int = 0


class Example:
    """A pipeline without a model: made-up token ids, and one prefix index for all conversations."""

    def __init__(self) -> None:
        self.index = BlockLedger(BLOCK, 1000)
        self.long_rope = LongRope(BOUNDARY)
        self._next_id = 0

    def new_ids(self, count: int) -> list[int]:
        """Ids that were not used before."""
        self._next_id += count
        return list(range(self._next_id - count, self._next_id))

    def turn(self, name: str, history: list[int]) -> tuple[Step, list[int]]:
        """Add a message and a reply to a history; returns the step and the new history."""
        prompt = [*history, *self.new_ids(MESSAGE)]
        reply = self.new_ids(REPLY)
        reused, room = self._match(prompt), self.long_rope.reply_room(len(prompt))
        first = reply if room is None else reply[:room]
        self._commit(prompt, first)
        recomputed = 0
        if len(first) < len(reply):
            whole = [*prompt, *first]
            recomputed = len(whole) - self._match(whole)
            self._commit(whole, reply[len(first) :])
        return Step(name, reused, len(prompt), len(prompt) + len(reply), recomputed), [*prompt, *reply]

    def _match(self, prompt: list[int]) -> int:
        return self.index.match(np.array(prompt, dtype=np.int64), self._namespace(prompt))

    def _commit(self, prompt: list[int], reply: list[int]) -> None:
        ids = np.array(prompt, dtype=np.int64)
        self.index.commit(ids, reply[:-1], longest=len(reply), exact=True, namespace=self._namespace(prompt))

    def _namespace(self, prompt: list[int]) -> bytes:
        return self.long_rope.namespace(self.long_rope.is_long(len(prompt)))


def steps() -> list[Step]:
    """A conversation that is rewound and forked, and then grows past the boundary."""
    example = Example()
    done: list[Step] = []
    histories = [example.new_ids(SYSTEM)]
    for number in (1, 2, 3):
        step, history = example.turn(f"turn {number}", histories[-1])
        done.append(step)
        histories.append(history)
    step, common = example.turn("rewind(1), new turn", histories[2])
    done.append(step)
    step, _ = example.turn("fork(): first branch", common)
    done.append(step)
    step, branch = example.turn("second branch", common)
    done.append(step)
    step, _ = example.turn("its next turn", branch)
    done.append(step)
    return done


def bar(x: float, y: float, tokens: float, colour: str) -> str:
    """A range of tokens."""
    return f'<rect x="{x:.1f}" y="{y}" width="{tokens * SCALE:.1f}" height="{BAR}" fill="{colour}"/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 15, fill: str = INK) -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def line(x: float, bottom: float, stroke: str) -> str:
    """A vertical line from above the bars down to `bottom`."""
    return f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" {stroke}/>'


def draw(done: list[Step]) -> str:
    """The picture as SVG."""
    longest = max(step.total for step in done)
    width, height = LEFT + longest * SCALE + RIGHT, TOP + ROW * len(done) + 36
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'font-family="system-ui, sans-serif" '
        'aria-label="The tokens of each chat turn: reused from the KV cache, prefilled, generated">'
    ]
    x: float = LEFT
    for colour, words in (
        (REUSED, "reused from the cache"),
        (PREFILLED, "prefilled"),
        (GENERATED, "generated"),
    ):
        out += [f'<rect x="{x}" y="14" width="14" height="14" fill="{colour}"/>', text(x + 20, 26, words)]
        x += 205 if colour == REUSED else 125
    for block in range(0, longest + BLOCK, BLOCK):
        left = LEFT + block * SCALE
        out.append(line(left, TOP + ROW * len(done) - 12, f'stroke="{FAINT}" stroke-opacity="0.35"'))
        if block % (2 * BLOCK) == 0:
            out.append(text(left, TOP - 12, str(block), anchor="middle", size=13, fill=FAINT))
    boundary, bottom = LEFT + BOUNDARY * SCALE, TOP + ROW * len(done) - 4
    out += [
        line(boundary, bottom, f'stroke="{INK}" stroke-dasharray="5 4"'),
        text(boundary, bottom + 16, "LongRoPE boundary of this example", anchor="middle", size=14),
    ]
    for row, step in enumerate(done):
        y = TOP + ROW * row
        out += [
            text(LEFT - 12, y + 16, step.name, anchor="end"),
            bar(LEFT, y, step.reused, REUSED),
            bar(LEFT + step.reused * SCALE, y, step.prompt - step.reused, PREFILLED),
            bar(LEFT + step.prompt * SCALE, y, step.total - step.prompt, GENERATED),
        ]
        cost = f"{step.prompt - step.reused} prefilled"
        if step.recomputed:
            again = bar(LEFT + (BOUNDARY + 1 - step.recomputed) * SCALE, y + BAR + 2, step.recomputed, PREFILLED)
            out.append(again.replace(f'height="{BAR}"', 'height="6"'))
            cost += f", {step.recomputed} again"
        out.append(text(LEFT + longest * SCALE + 30, y + 16, cost, size=14))
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(steps()), encoding="utf-8")
