"""What a list of measured times says: the middle, the spread, and percentiles that the count can carry."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Summary", "percentile"]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the values lie at or below, between neighbours in proportion.

    This is NumPy's default ("linear"; method 7 of Hyndman and Fan, 1996), which vLLM's serving benchmark uses too.

    Args:
        ordered: values in ascending order, at least one.
        share: 0 to 1.
    """
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """Values of one kind, in their own unit.

    Attributes:
        count: how many there are.
        mean: their mean.
        std: their sample standard deviation; 0 for one value.
        minimum: the least.
        p25: lower quartile.
        p50: median, the figure to quote.
        p75: upper quartile.
        p90: None for fewer than 10 values.
        p99: None for fewer than 100 values: it would be the maximum under another name.
        maximum: the greatest.
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
        """Of the values that are there; None when there are none."""
        found = sorted(value for value in values if value is not None)
        if not found:
            return None
        count = len(found)
        return cls(
            count=count,
            mean=statistics.fmean(found),
            std=statistics.stdev(found) if count > 1 else 0.0,
            minimum=found[0],
            p25=percentile(found, 0.25),
            p50=percentile(found, 0.5),
            p75=percentile(found, 0.75),
            p90=percentile(found, 0.9) if count >= 10 else None,
            p99=percentile(found, 0.99) if count >= 100 else None,
            maximum=found[-1],
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return asdict(self)
