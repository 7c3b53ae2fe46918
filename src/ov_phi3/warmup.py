"""The first inference ahead of the first request, and the measurement of what steps with drafts cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.generation.config import GenerationConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.generation.options import Speculation
    from ov_phi3.generation.results import GenerationResult

__all__ = ["warm_up"]

_REPEATED = range(100, 124)  # ids of a text that repeats itself: drafts of every number of tokens are worth their cost


def warm_up(
    generate: Callable[..., GenerationResult], ids: NDArray[np.int64], vocab_size: int, speculation: Speculation | None
) -> float:
    """Run short replies, see `Pipeline.warmup`; returns their milliseconds.

    Args:
        generate: `Pipeline.generate`.
        ids: a short prompt.
        vocab_size: of the model.
        speculation: as for `Pipeline.warmup`.
    """
    began = time.perf_counter()
    config = GenerationConfig(max_new_tokens=2, ignore_eos=True, do_sample=False, speculation=speculation)
    if generate(ids, config).config.speculation == "auto":
        text = [token % vocab_size for token in _REPEATED]
        prompt = [*ids.tolist(), *text]

        def repeat(so_far: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
            logits[:] = -np.inf
            logits[text[(len(so_far) - len(prompt)) % len(text)]] = 0.0
            return logits

        generate(prompt, config, max_new_tokens=2 * len(text), logits_processors=[repeat])
    return (time.perf_counter() - began) * 1000.0
