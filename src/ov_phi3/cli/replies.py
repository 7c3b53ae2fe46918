"""A reply on the terminal: its text while it streams, and the line about it at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.cli.terminal import PrefillBar
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.generation.results import GenerationResult

__all__ = ["describe", "show"]

_ENDINGS = {
    "length": "; ended at its length limit",
    "cancelled": "; stopped",
    "timeout": "; ended by its time limit",
    "loop": "; ended in a loop",
}


def show(stream: TokenStream, bar: PrefillBar) -> tuple[GenerationResult, bool]:
    """Print a reply while it streams; return the result and whether Ctrl-C stopped it."""
    interrupted = False
    with stream:
        try:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
            stream.cancel()
        finally:
            bar.clear()
        print(flush=True)
        return stream.result, interrupted


def describe(result: GenerationResult) -> str:
    """The line about a reply: its latency, and why it ended unless it came to an end by itself."""
    return f"[{result.metrics}{_ENDINGS.get(result.finish_reason, '')}]"
