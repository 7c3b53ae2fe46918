"""Latency of a pipeline over that of another, reply by reply."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ov_phi3

if TYPE_CHECKING:
    import random

__all__ = ["Pairs", "ratio_cells"]


@dataclass
class Pairs:
    """Replies of a pipeline and of the one it is compared with, to the same prompts.

    Attributes:
        ttft: ratio of the times to the first token, one per pair.
        tpot: ratio of the times per output token, one per pair.
        equal: number of pairs with equal ids.
    """

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    equal: int = 0

    def reply(
        self,
        base: ov_phi3.Pipeline,
        other: ov_phi3.Pipeline,
        prompt: Any,
        rng: random.Random,
        new_tokens: int,
        *,
        counts: bool = True,
    ) -> None:
        """Generate a reply with each pipeline, one right after the other in random order; a warm-up does not count."""
        results = {}
        for pipe in rng.sample([base, other], 2):
            results[pipe] = pipe.generate(
                prompt, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, repetition_penalty=1.0
            )
        if not counts:
            return
        metrics, default = results[other].metrics, results[base].metrics
        self.ttft.append((metrics.ttft_ms or math.nan) / (default.ttft_ms or math.nan))
        self.tpot.append((metrics.tpot_ms or math.nan) / (default.tpot_ms or math.nan))
        self.equal += results[other].token_ids == results[base].token_ids


def ratio_cells(ratios: list[float]) -> tuple[str, str]:
    """Median and quartiles of ratios, for a table."""
    ratio = ov_phi3.Summary.of(ratios)
    return (f"{ratio.p50:.3f}", f"{ratio.p25:.3f} to {ratio.p75:.3f}") if ratio else ("-", "")
