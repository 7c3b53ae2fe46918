"""Notes, progress lines and warnings on stderr, dimmed on a terminal, so that stdout holds only the reply."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ov_phi3.backends.protocol import BACKENDS
from ov_phi3.cli.model_list import remember

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from ov_phi3.backends.protocol import BackendName
    from ov_phi3.exporting.child import ProgressLine
    from ov_phi3.pipeline import Pipeline

__all__ = [
    "PrefillBar",
    "add_load_arguments",
    "dim",
    "is_dumb",
    "is_live",
    "load",
    "note",
    "progress",
    "properties",
    "set_quiet",
    "status_line",
    "without_controls",
    "wrapped_note",
    "wrapped_notes",
]


def dim(text: str) -> str:
    """The text, dimmed if stderr is a terminal and colour is not disabled (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or is_dumb() or not sys.stderr.isatty()
    return text if plain else f"\x1b[2m{text}\x1b[0m"


# Everything that would move the cursor or change the terminal, except for line ends and tabs.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_controls(text: str) -> str:
    """A text that cannot move the cursor or change the terminal."""
    return _CONTROLS.sub("", text)


def is_dumb() -> bool:
    """Whether the terminal says that it can move no cursor and show no colours."""
    return os.environ.get("TERM") == "dumb"


_quiet = False


def set_quiet(quiet: bool) -> None:
    """Print notes, warnings and progress from now on, or none of them."""
    global _quiet
    _quiet = quiet


def note(text: str, *, end: str = "\n") -> None:
    """Print a line for a person to stderr, unless they want none."""
    if not _quiet:
        print(dim(text), end=end, file=sys.stderr, flush=True)


def wrapped_note(text: str, *, indent: str = "") -> None:
    """Print a text for a person to stderr; on a terminal, its lines end between words.

    Args:
        text: one line or several.
        indent: what begins the second line, and those after it, that a line is broken into.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        note(text)
        return
    width = shutil.get_terminal_size().columns
    for line in text.split("\n"):
        note(textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) if line else "")


def wrapped_notes(entries: Mapping[str, str]) -> None:
    """Print names and their meanings in two columns, or below each other on a narrow terminal."""
    width = max(map(len, entries)) + 2
    narrow = shutil.get_terminal_size().columns < 3 * width
    for name, meaning in entries.items():
        if narrow:
            note(name)
        wrapped_note(f"  {meaning}" if narrow else f"{name:{width}}{meaning}", indent="  " if narrow else " " * width)


def is_live() -> bool:
    """Whether lines that are redrawn can be shown."""
    return sys.stderr is not None and sys.stderr.isatty() and not _quiet


_CLEAR = "\r\x1b[K"


def _redraw(text: str) -> None:
    """Replace the current line, cut to the width of the terminal."""
    note(_CLEAR + text[: shutil.get_terminal_size().columns - 1], end="")


def progress(line: ProgressLine) -> None:
    """Show a line of an export; progress bars are redrawn on a terminal and left out everywhere else."""
    on_terminal = is_live()
    if not line.transient:
        note((_CLEAR if on_terminal else "") + line)
    elif on_terminal:
        _redraw(line)


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A status line that is redrawn on a terminal and cleared at the end; nothing is shown everywhere else."""
    on_terminal = is_live()

    def show(text: str) -> None:
        if on_terminal:
            _redraw(text)

    try:
        yield show
    finally:
        if on_terminal:
            print(_CLEAR, end="", file=sys.stderr, flush=True)


class PrefillBar:
    """A progress bar for a long prefill, on a terminal. The thread that makes the reply calls it."""

    WIDTH = 30
    MIN_TOKENS = 256  # no bar for a shorter prefill

    def __init__(self) -> None:
        self._first: int | None = None
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Redraw the bar; clear it when the prefill is done."""
        if self._first is None:
            self._first = done
        if not is_live() or total - self._first < self.MIN_TOKENS:
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
        """Clear the bar if it is shown."""
        if self._shown:
            self._shown = False
            print(_CLEAR, end="", file=sys.stderr, flush=True)


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that load a model."""
    parser.add_argument("model", type=Path, help="directory of an exported model, or a name of `ov-phi3 models`")
    parser.add_argument(
        "--device",
        default="AUTO",
        help="AUTO (a discrete GPU, else any GPU, else the CPU) or exactly one, such as GPU.0 (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="llm_pipeline (openvino_genai.LLMPipeline), or infer_request (our own engine, with saved KV caches, logit "
        "bias and log-probabilities); default: llm_pipeline, or infer_request for an option that needs it",
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens that prompt and reply share")
    parser.add_argument("--kv-cache-gb", type=float, metavar="GIB", help="maximum memory for the KV cache")
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="prompt tokens prefilled at once; 0 for whole prompts"
    )
    add_draft_arguments(parser)
    add_property_argument(parser)


def add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a draft model."""
    parser.add_argument(
        "--draft-model",
        type=Path,
        metavar="DIR",
        help="a smaller exported model with the same tokenizer, which guesses tokens ahead; default backend then: "
        "infer_request",
    )
    parser.add_argument("--draft-device", metavar="DEVICE", help="device of the draft model (default: the model's)")


def add_property_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `properties` reads."""
    parser.add_argument(
        "--ov-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an OpenVINO property that overrides the latency defaults; repeatable",
    )


def properties(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` arguments as a dict; `true` and `false` become booleans."""
    from ov_phi3.errors import ConfigError

    config: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--ov-config {pair!r}; expected KEY=VALUE.")
        config[key] = {"true": True, "false": False}.get(value.lower(), value)
    return config


def add_concurrency(parser: argparse.ArgumentParser, default: int) -> None:
    """Add `--concurrency`; `load` takes the same default."""
    parser.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help=f"replies at once (default: {default}; 1 with --backend llm_pipeline, which runs one after another)",
    )


def load(args: argparse.Namespace, backend: str | None = None, concurrency: int = 1) -> Pipeline:
    """Load the model; print the device, the load time and warnings.

    Args:
        args: the command line.
        backend: taken without `--backend`.
        concurrency: replies at once without `--concurrency`, if the backend runs several.
    """
    import ov_phi3
    from ov_phi3.backends.registry import concurrency_on

    backend = args.backend or backend
    with warnings.catch_warnings(record=True) as caught, status_line() as show:
        warnings.simplefilter("always", ov_phi3.ModelWarning)
        show(f"Loading {args.model} ...")
        pipe = ov_phi3.load(
            args.model,
            args.device,
            backend=cast("BackendName | None", backend),
            ov_config=properties(args.ov_config) or None,
            context_length=args.context_length,
            kv_cache_gb=args.kv_cache_gb,
            prefill_chunk=args.prefill_chunk,
            draft_model=args.draft_model,
            draft_device=args.draft_device,
            concurrency=concurrency_on(backend, getattr(args, "concurrency", None), concurrency),
        )
    wrapped_note(f"{args.model} on {pipe.device}, loaded in {pipe.load_report.total_ms / 1000:.1f} s")
    if (draft := pipe.load_report.draft) is not None:
        wrapped_note(f"draft model {draft.path} on {draft.device}, {draft.weight_bytes / 2**20:,.0f} MiB of weights")
    remember(pipe.info)
    for warning in caught:
        wrapped_note(f"warning: {warning.message}")
    return pipe
