"""The errors of this library.

Each also derives from the closest built-in exception. An argument of a wrong *type* raises a plain `TypeError`. A
message names the wrong value, the expected values, and the fix.
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
    """A model directory is missing, incomplete, damaged, or of another architecture."""


class DeviceError(Error, RuntimeError):
    """A device does not exist, or cannot run the model."""


class ExportError(Error, RuntimeError):
    """`optimum-cli` is missing or failed, or its result is not a usable model."""


class ConfigError(Error, ValueError):
    """An option is unknown, out of range, or contradicts another option."""


class TemplateError(Error, ValueError):
    """The model's chat template does not support these messages."""


class PromptError(Error, ValueError):
    """A prompt cannot be encoded, or its token ids are outside the model's vocabulary."""


class ContextOverflowError(Error, ValueError):
    """Prompt and reply do not fit the context window.

    Attributes:
        prompt_tokens: tokens in the prompt.
        max_new_tokens: requested length of the reply in tokens, or None without a request.
        context_length: the context window, in tokens, that prompt and reply share.
    """

    def __init__(self, message: str, *, prompt_tokens: int, max_new_tokens: int | None, context_length: int) -> None:
        super().__init__(message)
        self._message = message
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context_length = context_length

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the numbers too, so that the error can be passed between processes."""
        numbers = (self.prompt_tokens, self.max_new_tokens, self.context_length)
        return _context_overflow, (self._message, *numbers)


def _context_overflow(message: str, prompt: int, new: int | None, window: int) -> ContextOverflowError:
    return ContextOverflowError(message, prompt_tokens=prompt, max_new_tokens=new, context_length=window)


class StreamError(Error, RuntimeError):
    """A stream was used in an unsupported way, for example iterated a second time."""


class GenerationError(Error, RuntimeError):
    """The engine failed while generating; the original exception is the `__cause__`."""


class SnapshotError(Error, ValueError):
    """A saved KV cache cannot be used: it is damaged, of another model, or of a newer format."""


class ClosedError(Error, RuntimeError):
    """The pipeline was closed before or during the call."""


def forked(what: str, process: int) -> str:
    """The message for a forked process that uses an object which its parent process loaded."""
    return (
        f"{what} was loaded by process {process}; this process is a fork of it, without OpenVINO's threads. Load "
        "the model in this process, or start it with multiprocessing's 'spawn'."
    )


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A sentence with the valid name closest to `name`, after a leading space; '' if no name is close."""
    closest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {closest[0]!r}?" if closest else ""
