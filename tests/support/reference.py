"""The model recomputed without a cache: what every greedy reply is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Reference:
    """A model in Hugging Face format, float32.

    Args:
        path: its directory.
        boundary: where a LongRoPE model changes its factors, in tokens.
    """

    def __init__(self, path: Path, boundary: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._boundary = boundary

    def differences(self, prompt: Sequence[int], reply: Sequence[int]) -> list[int]:
        """The places in a greedy reply at which the model, given all before, would have said something else.

        One pass over the whole sequence gives the likeliest token after each of its beginnings, as attention looks back
        only. The factors of LongRoPE go by the length of a pass, so beginnings up to the boundary get one of their own.
        """
        whole = [*prompt, *reply]
        likeliest: dict[int, int] = {}
        lengths = [len(whole) - 1]
        if self._boundary is not None:
            lengths.append(min(self._boundary, len(whole) - 1))
        for length in lengths:  # the short pass last, as it is right about the beginnings that both cover
            for position, token in enumerate(self._pass(whole[:length])):
                likeliest[position + 1] = int(token)
        return [i for i, token in enumerate(reply) if likeliest[len(prompt) + i] != token]

    def _pass(self, ids: Sequence[int]) -> Any:
        with self._torch.no_grad():
            logits = self._model(self._torch.tensor([list(ids)]), use_cache=False).logits[0]
        return np.asarray(logits.argmax(-1))
