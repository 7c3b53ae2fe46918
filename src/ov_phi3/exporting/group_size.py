"""The group size of 4-bit weights: whether it divides the widths of the model.

NNCF compresses weights in groups that share a scale. A group size that does not divide a layer's input width fails
after half a minute of work, so it is checked against `config.json` before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from ov_phi3.errors import ConfigError
from ov_phi3.model.config import Phi3Config

__all__ = ["GroupSize", "decide_group_size"]

_GROUPED_FORMATS = ("int4", "nf4", "cb4")
_SMALLEST = 16


@dataclass(frozen=True, slots=True)
class GroupSize:
    """The decision about the group size, as the manifest records it.

    Attributes:
        group_size: weights per group.
        channels: input width of the compressed layers, by the part of `config.json` that it comes from.
        adjusted: whether `group_size_fallback="adjust"` has to be added. Layers whose width the size does not divide
            then get the largest power of two that does, or int8 if that is below 32.
        reason: the reason, as a sentence.
    """

    group_size: int
    channels: Mapping[str, int]
    adjusted: bool
    reason: str


def decide_group_size(flags: Mapping[str, Any], config: Phi3Config, *, explicit: bool) -> GroupSize | None:
    """Decide whether the group size fits the model, or needs a fallback; None for a format without groups.

    Args:
        flags: the flags of the export.
        config: the model's `config.json`.
        explicit: whether the caller chose the group size, rather than the recipe.

    Raises:
        ConfigError: the caller's own group size does not divide a width, and there is no fallback.
    """
    size = flags.get("group_size", 128 if flags.get("weight_format") != "cb4" else -1)
    if flags.get("weight_format") not in _GROUPED_FORMATS or size == -1:
        return None
    channels = _channels(config)
    misfits = [f"{name} = {width}" for name, width in channels.items() if width % size]
    if not misfits:
        widths = ", ".join(str(width) for width in channels.values())
        return GroupSize(size, channels, adjusted=False, reason=f"{size} divides {widths}.")
    problem = f"{size} does not divide {', '.join(misfits)}"
    fallback = flags.get("group_size_fallback")
    if fallback not in (None, "error"):
        reason = f"{problem}; group_size_fallback={fallback!r} was given."
        return GroupSize(size, channels, adjusted=False, reason=reason)
    if explicit or fallback == "error":
        sizes = ", ".join(str(valid) for valid in _nearest_sizes(size, channels)) or "none of 16 or more"
        raise ConfigError(
            f"group_size is {size}, but {problem}. Nearest sizes that fit: {sizes}; or -1 (one group per row), or "
            'group_size_fallback="adjust" for another size in single layers.'
        )
    return GroupSize(size, channels, adjusted=True, reason=f'{problem}; group_size_fallback="adjust" is used.')


def _channels(config: Phi3Config) -> dict[str, int]:
    """Input widths of the layers that are compressed in groups.

    qkv_proj and gate_up_proj read the hidden state, o_proj the attention heads, down_proj the MLP. The embedding and
    the output layer have the width of the hidden state as well; they are int8, except with `all_layers`.
    """
    return {
        "hidden_size": config.hidden_size,
        "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }


def _nearest_sizes(size: int, channels: Mapping[str, int]) -> list[int]:
    """Up to three group sizes that divide all widths, nearest to a size; powers of two if there are any."""
    common = gcd(*channels.values())
    divisors = [divisor for divisor in range(_SMALLEST, common + 1) if common % divisor == 0]
    powers = [divisor for divisor in divisors if divisor & (divisor - 1) == 0]
    return sorted(sorted(powers or divisors, key=lambda divisor: abs(divisor - size))[:3])
