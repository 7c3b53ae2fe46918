"""How well a model predicts a fixed text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ov_phi3

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TEXT", "score"]

TEXT = Path(__file__).with_name("alice.txt")

WINDOW = 2048
"""Tokens of a text that are scored together; every one but the text's first is scored once."""


def score(model: Path, device: str, ids: list[int], properties: Mapping[str, Any]) -> ov_phi3.Score:
    """The log-probability of every token of a text after its first.

    The text is prefilled in chunks of 32 tokens, so that most of the attention reads the stored KV cache: with 8 bits
    on a CPU unless `properties` say otherwise, as `llm_pipeline` has it.
    """
    config = {k: v for k, v in properties.items() if k not in ("prompt_lookup", "ATTENTION_BACKEND")}
    if device.upper().startswith("CPU") and not any(key.endswith("CACHE_PRECISION") for key in config):
        config["KV_CACHE_PRECISION"] = "u8"
    logprobs: list[float] = []
    with ov_phi3.load(model, device, backend="infer_request", ov_config=config, prefill_chunk=32) as pipe:
        window = min(WINDOW, pipe.context_length) - 1
        for start in range(0, len(ids) - 1, window):
            logprobs += pipe.score(ids[start : start + 1], ids[start + 1 : start + 1 + window]).logprobs
    return ov_phi3.Score(ids[1:], logprobs)
