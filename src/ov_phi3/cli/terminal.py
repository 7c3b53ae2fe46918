"""What a person sees: notes on stderr, dimmed where the terminal can, so that stdout is the reply and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.protocol import BACKENDS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ov_phi3.exporting.child import ProgressLine
    from ov_phi3.pipeline import Pipeline

__all__ = ["PrefillBar", "add_load_arguments", "dim", "load", "note", "progress", "status_line"]


def dim(text: str) -> str:
    """The text, dimmed if stderr is a terminal that wants it (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def note(text: str, *, end: str = "\n") -> None:
    """A line for the person, not for a program."""
    print(dim(text), end=end, file=sys.stderr, flush=True)


_CLEAR = "\r\x1b[K"


def _redraw(text: str) -> None:
    """Replace the line that the cursor is on, cut to the terminal's width."""
    note(_CLEAR + text[: shutil.get_terminal_size().columns - 1], end="")


def progress(line: ProgressLine) -> None:
    """A line of an export: a progress bar redraws itself in a terminal, and is left out everywhere else."""
    watched = sys.stderr.isatty()
    if not line.transient:
        note((_CLEAR if watched else "") + line)
    elif watched:
        _redraw(line)


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line that says what is going on, redrawn on a terminal and gone at the end; nothing anywhere else."""
    watched = sys.stderr.isatty()

    def tell(text: str) -> None:
        if watched:
            _redraw(text)

    try:
        yield tell
    finally:
        if watched:
            print(_CLEAR, end="", file=sys.stderr, flush=True)


class PrefillBar:
    """A bar for a long prefill, on a terminal; told the progress by the reply's own thread."""

    WIDTH = 30
    WORTH_IT = 256  # tokens to prefill from which a person would wonder

    def __init__(self) -> None:
        self._first: int | None = None
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Redraw the bar; it goes when the first token comes."""
        if self._first is None:
            self._first = done
        if not sys.stderr.isatty() or total - self._first < self.WORTH_IT:
            return
        if done >= total:
            self.clear()
            return
        filled = self.WIDTH * done // total
        bar = "#" * filled + "-" * (self.WIDTH - filled)
        line = f"Reading the prompt [{bar}] {done} of {total} tokens"
        _redraw(line)
        self._shown = True

    def clear(self) -> None:
        """Take the bar off the screen, if it is there."""
        if self._shown:
            self._shown = False
            print(_CLEAR, end="", file=sys.stderr, flush=True)


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every command which loads a model takes."""
    parser.add_argument("model", type=Path, help="directory of an exported model")
    parser.add_argument(
        "--device",
        default="AUTO",
        help="AUTO (a discrete GPU, else any GPU, else the CPU) or exactly one, such as GPU.0 (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="llm_pipeline (openvino_genai.LLMPipeline), or infer_request: our own loop, which has saved KV caches, "
        "logit bias and log-probabilities (default: llm_pipeline, or infer_request for an option that needs it)",
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens that prompt and reply share")
    parser.add_argument("--kv-cache-gb", type=float, metavar="GIB", help="most memory for the KV cache")
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="prompt tokens computed at once; 0 for whole prompts"
    )
    parser.add_argument(
        "--ov-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an OpenVINO property, laid over the latency defaults; can be given several times",
    )


def properties(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` arguments as a dict; True and False become booleans."""
    from ov_phi3.errors import ConfigError

    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--ov-config {pair!r}; expected KEY=VALUE.")
        out[key] = {"true": True, "false": False}.get(value.lower(), value)
    return out


def load(args: argparse.Namespace, backend: str = "llm_pipeline") -> Pipeline:
    """Load the model, telling which device it went to; on `backend`, unless another was asked for."""
    import ov_phi3

    with warnings.catch_warnings(record=True) as caught, status_line() as tell:
        warnings.simplefilter("always", ov_phi3.ModelWarning)
        tell(f"Loading {args.model} ...")
        pipe = ov_phi3.load(
            args.model,
            args.device,
            backend=args.backend or backend,
            ov_config=properties(args.ov_config) or None,
            context_length=args.context_length,
            kv_cache_gb=args.kv_cache_gb,
            prefill_chunk=args.prefill_chunk,
        )
    note(f"{args.model} on {pipe.device}, loaded in {pipe.load_report.total_ms / 1000:.1f} s")
    for warning in caught:
        note(f"warning: {warning.message}")
    return pipe
