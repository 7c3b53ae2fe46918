"""Every error the library raises on purpose.

Each also derives from the built-in exception a caller would guess. An argument of a wrong *type* is a plain
`TypeError`. A message names the value that was wrong, what was expected, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ClosedError",
    "ConfigError",
    "ContextOverflowError",
    "DeviceError",
    "Error",
    "ExportError",
    "GenerationError",
    "ModelError",
    "PromptError",
    "SnapshotError",
    "StreamError",
    "TemplateError",
]


class Error(Exception):
    """Root of all errors raised by `ov_phi3`."""


class ModelError(Error, ValueError):
    """A model directory is missing, incomplete, broken, or holds another architecture."""


class DeviceError(Error, RuntimeError):
    """A device is not there, or is there and cannot run the model."""


class ExportError(Error, RuntimeError):
    """`optimum-cli` is missing or failed, or what it wrote is not a usable model."""


class ConfigError(Error, ValueError):
    """An option is unknown, out of range, or contradicts another one."""


class TemplateError(Error, ValueError):
    """Messages that the model's chat layout cannot hold."""


class PromptError(Error, ValueError):
    """A prompt that cannot become token ids, or token ids outside the model's vocabulary."""


class ContextOverflowError(Error, ValueError):
    """Prompt and reply do not fit the context window.

    Attributes:
        prompt_tokens: tokens in the prompt.
        max_new_tokens: reply length that was asked for, or None when none was.
        context_length: the window, in tokens, that prompt and reply share.
    """

    def __init__(self, message: str, *, prompt_tokens: int, max_new_tokens: int | None, context_length: int) -> None:
        super().__init__(message)
        self._message = message
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context_length = context_length

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled with its numbers, so that it can cross a process pool."""
        numbers = (self.prompt_tokens, self.max_new_tokens, self.context_length)
        return _context_overflow, (self._message, *numbers)


def _context_overflow(message: str, prompt: int, new: int | None, window: int) -> ContextOverflowError:
    return ContextOverflowError(message, prompt_tokens=prompt, max_new_tokens=new, context_length=window)


class StreamError(Error, RuntimeError):
    """A stream was used in a way it cannot be, for example iterated a second time."""


class GenerationError(Error, RuntimeError):
    """The engine failed while generating; the original exception is the `__cause__`."""


class SnapshotError(Error, ValueError):
    """A saved KV cache cannot be used: damaged, of another model, or of a newer format."""


class ClosedError(Error, RuntimeError):
    """The pipeline was closed before, or while, this was asked of it."""


def forked(what: str, process: int) -> str:
    """What to tell a forked process that uses what its parent loaded."""
    return (
        f"{what} was loaded by process {process}, and this is a fork of it, which has none of OpenVINO's threads. Load "
        "the model in this process, or start it with multiprocessing's 'spawn'."
    )


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A sentence naming the valid name nearest to `name`, with a leading space, or '' when nothing is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
