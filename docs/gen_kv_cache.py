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

# Narrow, so that the text is legible where a phone scales the picture to its width.
WIDTH, MARGIN, TOP, ROW, BAR = 400, 14, 78, 50, 18
# A sheet of its own behind everything: the site's colours can be changed by hand, which a picture does not see.
STYLE = """
  .sheet { fill: #ffffff; stroke: #d1d5db; }
  text { font: 14px system-ui, sans-serif; fill: #1f2937; }
  .label { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; }
  .tick { font-size: 12px; fill: #4b5563; }
  .grid { stroke: #9ca3af; stroke-opacity: 0.45; }
  .boundary { stroke: #1f2937; stroke-width: 1.5; stroke-dasharray: 5 4; }
  .reused { fill: #2e9e6b; } .prefilled { fill: #e08a1e; } .generated { fill: #3b7dd8; }
  @media (prefers-color-scheme: dark) {
    .sheet { fill: #1b1d24; stroke: #4b5563; }
    text { fill: #f3f4f6; } .label { stroke: #1b1d24; }
    .tick { fill: #c3c8d1; } .grid { stroke-opacity: 0.4; } .boundary { stroke: #f3f4f6; }
    .reused { fill: #3fbf85; } .prefilled { fill: #f2a03d; } .generated { fill: #6aa5f5; }
  }
"""


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


def bar(x: float, y: float, width: float, kind: str, *, height: int = BAR) -> str:
    """A range of tokens, or a square of the legend."""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "label") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def line(x: float, bottom: float, kind: str) -> str:
    """A vertical line from above the bars down to `bottom`."""
    return f'<line class="{kind}" x1="{x:.1f}" y1="{TOP - 18}" x2="{x:.1f}" y2="{bottom}"/>'


def draw(done: list[Step]) -> str:
    """The picture as SVG."""
    longest = max(step.total for step in done)
    scale = (WIDTH - 2 * MARGIN) / longest
    bottom = TOP + ROW * len(done)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 34}" '
        f'viewBox="0 0 {WIDTH} {bottom + 34}" role="img">',
        "<title>The tokens of each chat turn: reused from the KV cache, prefilled, generated</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="sheet" x="0.5" y="0.5" width="{WIDTH - 1}" height="{bottom + 33}" rx="8"/>',
    ]
    for x, kind, words in (
        (MARGIN, "reused", "reused from the cache"),
        (206, "prefilled", "prefilled"),
        (300, "generated", "generated"),
    ):
        out += [bar(x, 16, 14, kind, height=14), text(x + 20, 28, words)]
    for block in range(0, longest + 1, BLOCK):
        x = MARGIN + block * scale
        out.append(line(x, bottom, "grid"))
        if block % (2 * BLOCK) == 0:
            words, anchor = (str(block), "middle") if block else ("0 tokens", "start")
            out.append(text(x, TOP - 24, words, anchor=anchor, kind="tick"))
    boundary = MARGIN + BOUNDARY * scale
    out += [
        line(boundary, bottom + 6, "boundary"),
        text(boundary + 40, bottom + 22, "LongRoPE boundary of this example", anchor="end", kind="tick"),
    ]
    for row, step in enumerate(done):
        y = TOP + ROW * row
        cost = f"{step.prompt - step.reused} prefilled"
        if step.recomputed:
            again = MARGIN + (BOUNDARY + 1 - step.recomputed) * scale
            out.append(bar(again, y + 8 + BAR + 3, step.recomputed * scale, "prefilled", height=6))
            cost += f", {step.recomputed} again"
        ends = [0, step.reused, step.prompt, step.total]
        out += [
            bar(MARGIN + begin * scale, y + 8, (end - begin) * scale, kind)
            for begin, end, kind in zip(ends, ends[1:], ("reused", "prefilled", "generated"), strict=False)
        ]
        out.append(text(MARGIN, y + 2, f"{step.name}: {cost}"))
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(steps()), encoding="utf-8")
