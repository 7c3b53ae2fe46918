"""Messages for failed subprocesses of an export."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["explain_failure"]

_SHOWN_LINES = 15
_KILLED = (-9, 137)
_FREE_MEMORY = "close other programs, or use a larger machine."
_ADVICE = (
    (r"No space left on device", "The disk is full."),
    (r"MemoryError|bad_alloc|DefaultCPUAllocator", f"Memory ran out: {_FREE_MEMORY}"),
    (r"InvalidGroupSizeError", 'Pass group_size_fallback="adjust".'),
    (r"GatedRepo|401 Client|403 Client", "The model needs a login or an accepted licence: `hf auth login`."),
    (r"RepositoryNotFound|not a valid model identifier|404 Client", "Check the spelling of the model's name."),
    (
        r"Connect(ion)?Error|LocalEntryNotFound|MaxRetryError|offline mode|Name or service|client has been closed",
        "The hub cannot be reached: check the network, or download the model elsewhere and pass its directory.",
    ),
)


def explain_failure(problem: str, code: int, output: Sequence[str]) -> str:
    """A line with the reason of a failure and the fix, then the end of the subprocess's output.

    Args:
        problem: what failed, as the start of a sentence.
        code: the exit code; negative for a signal.
        output: the last lines of the output.
    """
    if code in _KILLED:
        reason, advice = "it was killed.", f"Most likely memory ran out: {_FREE_MEMORY}"
    else:
        reason = output[-1].strip() if output else "it printed nothing"
        reason = reason if reason.endswith((".", "!", "?")) else f"{reason}."
        text = "\n".join(output)
        advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), "")
    summary = f"{problem} (exit code {code}): {reason} {advice}".rstrip()
    return "\n".join([summary, *(f"  | {line}" for line in output[-_SHOWN_LINES:])])
