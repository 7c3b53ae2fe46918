"""Measure a pipeline: exact prompt lengths, fresh content every time, warm-up apart, every sample kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError
from ov_phi3.metrics import Metrics

if TYPE_CHECKING:
    from ov_phi3.pipeline import Pipeline

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Replies of one prompt length and one reply length.

    Attributes:
        prompt_tokens: length of every prompt.
        new_tokens: length of every reply; forced, end tokens do not end it.
        samples: the metrics of each reply, in order.
    """

    prompt_tokens: int
    new_tokens: int
    samples: tuple[Metrics, ...]

    @property
    def ttft_ms(self) -> float:
        """Median time to first token, milliseconds."""
        return median(s.ttft_ms for s in self.samples if s.ttft_ms is not None)

    @property
    def tpot_ms(self) -> float | None:
        """Median time per output token, milliseconds; None for replies of one token."""
        found = [s.tpot_ms for s in self.samples if s.tpot_ms is not None]
        return median(found) if found else None

    @property
    def total_ms(self) -> float:
        """Median time of a whole reply, milliseconds."""
        return median(s.total_ms for s in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """The medians and every sample as JSON-ready values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "total_ms": self.total_ms,
            "samples": [s.to_dict() for s in self.samples],
        }


def measure(
    pipe: Pipeline,
    *,
    prompt_tokens: int | Sequence[int] = (32, 256),
    new_tokens: int = 64,
    repeat: int = 5,
    seed: int = 0,
) -> list[Measurement]:
    """Greedy replies of a forced length to prompts of exact lengths, one measurement per prompt length.

    Every prompt is drawn anew from the ordinary vocabulary, so that no prefix cache can shorten a first token. One
    reply of each prompt length is thrown away first: kernels are chosen per shape, and the first use of one pays for
    that.

    Args:
        pipe: a loaded pipeline.
        prompt_tokens: prompt lengths.
        new_tokens: tokens per reply.
        repeat: replies per prompt length.
        seed: of the prompts' content.

    Raises:
        ConfigError: a length or count below 1.
        ContextOverflowError: prompt and reply do not fit the context window.
    """
    lengths = [prompt_tokens] if isinstance(prompt_tokens, int) else list(prompt_tokens)
    for name, value in (("prompt_tokens", min(lengths, default=0)), ("new_tokens", new_tokens), ("repeat", repeat)):
        if value < 1:
            raise ConfigError(f"{name}={value}; expected at least 1.")
    rng = random.Random(seed)
    return [Measurement(n, new_tokens, tuple(_replies(pipe, n, new_tokens, repeat + 1, rng))[1:]) for n in lengths]


def _replies(pipe: Pipeline, prompt_tokens: int, new_tokens: int, count: int, rng: random.Random) -> list[Metrics]:
    special = set(pipe.tokenizer.control_tokens.values())
    ordinary = [i for i in range(min(pipe.info.vocab_size, pipe.tokenizer.vocab_size)) if i not in special]
    return [
        pipe.generate(
            rng.choices(ordinary, k=prompt_tokens), max_new_tokens=new_tokens, ignore_eos=True, do_sample=False
        ).metrics
        for _ in range(count)
    ]
