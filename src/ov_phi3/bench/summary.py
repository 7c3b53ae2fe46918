"""Summary statistics of measured values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Summary", "percentile"]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated linearly between neighbours.

    This is NumPy's default ("linear"; method 7 of Hyndman and Fan, 1996), which vLLM's serving benchmark uses too.

    Args:
        ordered: values in ascending order, at least one.
        share: 0 to 1.
    """
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of values of one kind, in the unit of the values.

    Attributes:
        count: number of values.
        mean: arithmetic mean.
        std: sample standard deviation; 0 for a single value.
        minimum: smallest value.
        p25: lower quartile.
        p50: median, the figure to quote.
        p75: upper quartile.
        p90: 90th percentile; None for fewer than 10 values.
        p99: 99th percentile; None for fewer than 100 values, where it would be the maximum under another name.
        maximum: largest value.
    """

    count: int
    mean: float
    std: float
    minimum: float
    p25: float
    p50: float
    p75: float
    p90: float | None
    p99: float | None
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Summary | None:
        """The summary of the values that are not None; None without such values."""
        ordered = sorted(value for value in values if value is not None)
        if not ordered:
            return None
        count = len(ordered)
        return cls(
            count=count,
            mean=statistics.fmean(ordered),
            std=statistics.stdev(ordered) if count > 1 else 0.0,
            minimum=ordered[0],
            p25=percentile(ordered, 0.25),
            p50=percentile(ordered, 0.5),
            p75=percentile(ordered, 0.75),
            p90=percentile(ordered, 0.9) if count >= 10 else None,
            p99=percentile(ordered, 0.99) if count >= 100 else None,
            maximum=ordered[-1],
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        return asdict(self)
