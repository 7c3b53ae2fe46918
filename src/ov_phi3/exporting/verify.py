"""Whether an exported model really loads. Runs in a subprocess of its own, with the run-time packages only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

__all__ = ["RESULT", "main", "verify"]

RESULT = "ov_phi3-verified: "
"""What the line begins with that holds the checks made, as a JSON list."""

_SAMPLE = "Hello, world"
_INFER_BELOW = 2**30


def verify(directory: Path) -> list[str]:
    """Read the graph, run the tokenizer both ways and, up to 1 GiB of weights, run one inference on the CPU.

    Returns:
        the checks made: "read_model", "tokenizer", "inference".

    Raises:
        RuntimeError: something does not load, or gives nothing usable.
    """
    import numpy as np

    from ov_phi3.system.core import import_genai, import_openvino

    core = import_openvino().Core()
    model = core.read_model(directory / "openvino_model.xml")
    tokenizer = import_genai().Tokenizer(str(directory))
    ids = tokenizer.encode(_SAMPLE).input_ids.data
    if ids.size == 0 or not tokenizer.decode(ids[0].tolist()).strip():
        raise RuntimeError(f"the tokenizer turns {_SAMPLE!r} into {ids.tolist()}, and that into nothing")
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
            f"an inference gave logits of shape {logits.shape}, or not finite; expected {vocabulary} each"
        )
    return [*checks, "inference"]


def main() -> None:
    """Verify the directory named by the first argument, and print the checks made."""
    print(RESULT + json.dumps(verify(Path(sys.argv[1]))), flush=True)  # noqa: T201 - read by the parent
