"""Write the module tables of `architecture.md` and draw `architecture.svg`: `python docs/gen_architecture.py`.

The tables hold the first sentence of every module's docstring. `tests/project/test_docs.py` fails while the page or the
picture and the code differ.
"""

from __future__ import annotations

import ast
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

STYLE = """
  .box { fill: #f3f4f6; stroke: #6b7280; stroke-width: 1.5; }
  .main { fill: #dbeafe; stroke: #2563eb; stroke-width: 1.5; }
  .ours { fill: #dcfce7; stroke: #16a34a; stroke-width: 1.5; }
  text { font: 15px system-ui, sans-serif; fill: #111827; }
  .small { font-size: 12.5px; fill: #374151; }
  .head { font-weight: 600; }
  .arrow { stroke: #2563eb; stroke-width: 2; fill: none; }
  .back { stroke: #16a34a; stroke-width: 2; fill: none; }
  .down { fill: #2563eb; } .up { fill: #16a34a; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #1f2937; stroke: #9ca3af; } .main { fill: #1e3a8a; stroke: #93c5fd; }
    .ours { fill: #14532d; stroke: #86efac; } text { fill: #f9fafb; } .small { fill: #d1d5db; }
    .arrow { stroke: #93c5fd; } .back { stroke: #86efac; } .down { fill: #93c5fd; } .up { fill: #86efac; }
  }
"""
WIDTH, STEP, BOX = 720, 92, 62
STAGES = (
    ("prompt: text, messages, ids", "pipeline.py, chat.py, prefix.py: the facade", "box"),
    ("segments → token ids", "text/: chat template, tokenizer (text stays data)", "box"),
    ("Submission", "engine/engine.py: limits, request queue, worker", "main"),
    ("Request", "engine/runner.py: prefill chunks, LongRoPE (for GenAI)", "main"),
    ("backends/llm_pipeline.py", "openvino_genai.LLMPipeline", "box"),
    ("backends/paged/", "block manager, scheduler, model runner, sampler", "ours"),
)
BACK = (
    ("chunks, result", "head"),
    ("engine/channel.py,", "small"),
    ("engine/stream.py", "small"),
    ("token ids", "head"),
    ("engine/worker.py,", "small"),
    ("text/stream_decoder.py,", "small"),
    ("text/stop_strings.py", "small"),
)


def draw() -> str:
    """The picture: the path of a prompt down to the backends, and of the tokens back."""
    bottom = 20 + 4 * STEP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOX + 20}" role="img">',
        "<title>The path of a prompt: from the facade through text and engine to a backend, and back</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{_marker('d', 'down')}{_marker('u', 'up')}</defs>",
    ]
    for row, (head, detail, kind) in enumerate(STAGES[:4]):
        top = 20 + row * STEP
        parts.append(_box(20, top, 420, head, detail, kind))
        parts.append(f'<path class="arrow" marker-end="url(#d)" d="M185,{top + BOX} L185,{top + STEP - 2}"/>')
    for index, (head, detail, kind) in enumerate(STAGES[4:]):
        parts.append(_box(20 + index * 350, bottom, 330, head, detail, kind))
    # Our own engine schedules by itself: its requests pass the runner unchanged.
    side = bottom - STEP + BOX // 2
    parts.append(f'<path class="arrow" marker-end="url(#d)" d="M440,{side} L480,{side} L480,{bottom - 2}"/>')
    parts.append(f'<path class="back" marker-end="url(#u)" d="M670,{bottom} L670,56"/>')
    for line, (text, style) in enumerate(BACK):
        top = bottom - 60 - 24 * (len(BACK) - line)
        parts.append(f'<text x="658" y="{top}" text-anchor="end" class="{style}">{text}</text>')
    parts.append('<text x="670" y="44" text-anchor="middle" class="head">reader</text>')
    parts.append("</svg>\n")
    return "\n".join(parts)


def _marker(name: str, style: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path class="{style}" d="M0,0 L10,5 L0,10 z"/></marker>'
    )


def _box(left: int, top: int, width: int, head: str, detail: str, kind: str) -> str:
    middle = left + width // 2
    return (
        f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{BOX}" rx="8"/>'
        f'<text x="{middle}" y="{top + 26}" text-anchor="middle" class="head">{head}</text>'
        f'<text x="{middle}" y="{top + 47}" text-anchor="middle" class="small">{detail}</text>'
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(draw(), encoding="utf-8")
