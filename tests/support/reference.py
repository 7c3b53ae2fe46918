"""The model computed without a cache, as the reference for greedy replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Reference:
    """A model in Hugging Face format, float32.

    Args:
        path: its directory.
        boundary: length at which a LongRoPE model switches its factors, in tokens; None for other models.
    """

    def __init__(self, path: Path, boundary: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._boundary = boundary

    def differences(self, prompt: Sequence[int], reply: Sequence[int]) -> list[int]:
        """The positions in a greedy reply at which the model predicts another token from all preceding tokens.

        Attention is causal, so one pass over the sequence gives the most likely next token of every prefix. The
        LongRoPE factors depend on the length of a pass, so prefixes up to the boundary take a second pass.
        """
        sequence = [*prompt, *reply]
        predicted: dict[int, int] = {}
        lengths = [len(sequence) - 1]
        if self._boundary is not None:
            lengths.append(min(self._boundary, len(sequence) - 1))
        for length in lengths:  # the short pass last: it is right for the prefixes that both cover
            for position, token in enumerate(self._pass(sequence[:length])):
                predicted[position + 1] = int(token)
        return [i for i, token in enumerate(reply) if predicted[len(prompt) + i] != token]

    def _pass(self, ids: Sequence[int]) -> Any:
        with self._torch.no_grad():
            logits = self._model(self._torch.tensor([list(ids)]), use_cache=False).logits[0]
        return np.asarray(logits.argmax(-1))
