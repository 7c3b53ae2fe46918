"""Write the module tables of `architecture.md` and draw `architecture.svg`: `python docs/gen_architecture.py`.

The tables hold the first sentence of every module's docstring. `tests/project/test_docs.py` fails while the page or the
picture and the code differ.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
PICTURE = Path(__file__).with_name("architecture.svg")
PACKAGE = Path(__file__).parent.parent / "src" / "ov_phi3"

# From the top. A package imports only packages below it.
LAYERS = ("cli", "serving", "bench", "root", "exporting", "engine", "backends")
LAYERS += ("kv", "generation", "text", "model", "system", "ground")
GROUND = ("errors", "checks", "files", "signatures", "_version")
NOT_LISTED = ("__init__", "__main__", "_version")


def modules(layer: str) -> list[Path]:
    """The modules of a package, or of the two layers that lie in the top folder."""
    if layer == "ground":
        return [PACKAGE / f"{name}.py" for name in GROUND if name not in NOT_LISTED]
    if layer == "root":
        return sorted(p for p in PACKAGE.glob("*.py") if p.stem not in (*GROUND, *NOT_LISTED))
    return sorted(p for p in (PACKAGE / layer).rglob("*.py") if p.stem not in NOT_LISTED)


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def table(layer: str) -> str:
    """One row for each module."""
    rows = []
    for path in modules(layer):
        name = path.relative_to(PACKAGE if layer in ("root", "ground") else PACKAGE / layer).with_suffix("")
        rows.append(f"| `{name.as_posix()}` | {summary(path).replace('|', '&#124;')} |")
    return "\n".join(["| module | |", "| --- | --- |", *rows])


def with_tables(text: str) -> str:
    """The page with its tables written anew."""
    for layer in LAYERS:
        begin, end = f"<!-- modules {layer} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise SystemExit(f"{PAGE.name} has no table of {layer}.")
        text = f"{before}{begin}{table(layer)}\n{rest[rest.index(end) :]}"
    return text


# -- the picture -------------------------------------------------------------------------------------------------------

# Narrow, so that the text is legible where a phone scales the picture to its width; on a sheet of its own, because the
# site's colours can be changed by hand, which a picture does not see.
STYLE = """
  .sheet { fill: #ffffff; stroke: #d1d5db; }
  .box { fill: #f3f4f6; stroke: #6b7280; stroke-width: 1.5; }
  .main { fill: #dbeafe; stroke: #2563eb; stroke-width: 1.5; }
  .ours { fill: #dcfce7; stroke: #16a34a; stroke-width: 1.5; }
  text { font: 14px system-ui, sans-serif; fill: #111827; }
  .small { font-size: 12.5px; fill: #374151; }
  .head { font-weight: 600; }
  .arrow { stroke: #2563eb; stroke-width: 2; fill: none; }
  .back { stroke: #16a34a; stroke-width: 2; fill: none; }
  .down { fill: #2563eb; } .up { fill: #16a34a; }
  @media (prefers-color-scheme: dark) {
    .sheet { fill: #1b1d24; stroke: #4b5563; }
    .box { fill: #1f2937; stroke: #9ca3af; } .main { fill: #1e3a8a; stroke: #93c5fd; }
    .ours { fill: #14532d; stroke: #86efac; } text { fill: #f9fafb; } .small { fill: #d1d5db; }
    .arrow { stroke: #93c5fd; } .back { stroke: #86efac; } .down { fill: #93c5fd; } .up { fill: #86efac; }
  }
"""
WIDTH, MARGIN, STEP = 400, 14, 104
COLUMN, BACKEND = 300, 177
"""Width of the boxes on the way down, and of the two backends."""
STAGES = (
    ("box", "prompt: text, messages, ids", "pipeline.py, chat.py, prefix.py:", "the facade"),
    ("box", "segments → token ids", "text/: chat template, tokenizer", "(text stays data)"),
    ("main", "Submission", "engine/engine.py: limits,", "request queue, worker"),
    ("main", "Request", "engine/runner.py: prefill in chunks,", "LongRoPE (for GenAI)"),
)
BACKENDS = (
    ("box", "llm_pipeline.py", "openvino_genai's", "LLMPipeline"),
    ("ours", "paged/", "block manager, sched-", "uler, runner, sampler"),
)
BACK = "token ids → chunks, result"
BACK_MODULES = ("worker, stream_decoder,", "stop_strings, channel, stream")


def draw() -> str:
    """The picture: the path of a prompt down to the backends, and of the tokens back."""
    bottom = MARGIN + len(STAGES) * STEP
    height = bottom + _height(3) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'role="img">',
        "<title>The path of a prompt: from the facade through text and engine to a backend, and back</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{_marker('d', 'down')}{_marker('u', 'up')}</defs>",
        f'<rect class="sheet" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
    ]
    for row, (kind, *lines) in enumerate(STAGES):
        top = MARGIN + row * STEP
        parts.append(_box(MARGIN, top, COLUMN, kind, lines))
        parts.append(f'<path class="arrow" marker-end="url(#d)" d="M102,{top + _height(3)} L102,{top + STEP - 2}"/>')
    for index, (kind, *lines) in enumerate(BACKENDS):
        parts.append(_box(MARGIN + index * (BACKEND + 18), bottom, BACKEND, kind, lines))
    # Our own engine schedules by itself: its requests pass the runner unchanged.
    parts.append(f'<path class="arrow" marker-end="url(#d)" d="M260,{bottom - STEP + _height(3)} L260,{bottom - 2}"/>')
    parts.append(f'<path class="back" marker-end="url(#u)" d="M374,{bottom} L374,{MARGIN + 2}"/>')
    middle = (MARGIN + bottom) // 2
    for x, line, style in ((334, BACK, "head"), (350, BACK_MODULES[0], "small"), (366, BACK_MODULES[1], "small")):
        parts.append(
            f'<text x="{x}" y="{middle}" text-anchor="middle" class="{style}" transform="rotate(-90 {x} {middle})">'
            f"{line}</text>"
        )
    parts.append("</svg>\n")
    return "\n".join(parts)


def _height(lines: int) -> int:
    """Height of a box that holds so many lines."""
    return 14 + 21 * lines


def _marker(name: str, style: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path class="{style}" d="M0,0 L10,5 L0,10 z"/></marker>'
    )


def _box(left: int, top: int, width: int, kind: str, lines: Sequence[str]) -> str:
    middle = left + width // 2
    out = [f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{_height(len(lines))}" rx="8"/>']
    for index, line in enumerate(lines):
        style = "small" if index else "head"
        out.append(f'<text x="{middle}" y="{top + 24 + 21 * index}" text-anchor="middle" class="{style}">{line}</text>')
    return "".join(out)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(draw(), encoding="utf-8")
