"""Loads an exported model as a check. Runs in a subprocess of its own, with the run-time packages only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

__all__ = ["RESULT", "main", "verify"]

RESULT = "ov_phi3-verified: "
"""Start of the output line that holds the passed checks, as a JSON list."""

_SAMPLE = "Hello, world"
_INFER_BELOW = 2**30


def verify(directory: Path) -> list[str]:
    """Read the graph, encode and decode a text and, for up to 1 GiB of weights, run one inference on the CPU.

    Returns:
        The passed checks: "read_model", "tokenizer", "inference".

    Raises:
        RuntimeError: a part does not load, or its result is wrong.
    """
    import numpy as np

    from ov_phi3.system.core import import_genai, import_openvino

    core = import_openvino().Core()
    model = core.read_model(directory / "openvino_model.xml")
    tokenizer = import_genai().Tokenizer(str(directory))
    ids = tokenizer.encode(_SAMPLE).input_ids.data
    if ids.size == 0 or not tokenizer.decode(ids[0].tolist()).strip():
        raise RuntimeError(f"the tokenizer encodes {_SAMPLE!r} as {ids.tolist()}, and decodes that to an empty text")
    checks = ["read_model", "tokenizer"]
    if (directory / "openvino_model.bin").stat().st_size > _INFER_BELOW:
        return checks
    request = core.compile_model(model, "CPU").create_infer_request()
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.size, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    names = {name for port in model.inputs for name in port.get_names()}
    logits = next(iter(request.infer({name: value for name, value in inputs.items() if name in names}).values()))
    vocabulary = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if logits.shape[-1] != vocabulary or not np.isfinite(logits).all():
        raise RuntimeError(
            f"an inference gave logits of shape {logits.shape}, or infinite ones; expected {vocabulary} per token"
        )
    return [*checks, "inference"]


def main() -> None:
    """Verify the directory named by the first argument, and print the passed checks."""
    print(RESULT + json.dumps(verify(Path(sys.argv[1]))), flush=True)  # noqa: T201 - read by the parent
