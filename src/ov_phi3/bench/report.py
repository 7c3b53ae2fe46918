"""What a measurement amounts to: samples, their summaries, and all that they depend on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from ov_phi3.bench.roofline import Roofline
from ov_phi3.generation.metrics import Metrics
from ov_phi3.generation.results import FinishReason
from ov_phi3.system.machine import Machine

__all__ = ["ChatTurn", "Measurement", "Report", "Summary", "percentile"]


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


@dataclass(frozen=True, slots=True)
class _Samples:
    """Replies that were measured under the same conditions.

    Attributes:
        samples: the metrics of each reply, in order.
    """

    samples: tuple[Metrics, ...]

    @property
    def ttft(self) -> Summary | None:
        """Time to first token, from the request until the token is on the caller's side, milliseconds."""
        return Summary.of(s.ttft_ms for s in self.samples)

    @property
    def engine_ttft(self) -> Summary | None:
        """Time to first token by the engine's own clock, milliseconds."""
        return Summary.of(s.engine_ttft_ms for s in self.samples)

    @property
    def first_text(self) -> Summary | None:
        """From the request to the first text that can be shown, milliseconds."""
        return Summary.of(s.first_text_ms for s in self.samples)

    @property
    def tpot(self) -> Summary | None:
        """Time per output token of each reply, milliseconds; None for replies of one token."""
        return Summary.of(s.tpot_ms for s in self.samples)

    @property
    def engine_tpot(self) -> Summary | None:
        """Mean gap between tokens by the engine's own clock, milliseconds."""
        return Summary.of(s.engine_tpot_ms for s in self.samples)

    @property
    def inter_token(self) -> Summary | None:
        """Every gap between two tokens of every reply, milliseconds; the percentiles show what a mean hides."""
        return Summary.of(gap for s in self.samples for gap in s.inter_token_ms)

    @property
    def total(self) -> Summary | None:
        """From the request to the end of the reply, milliseconds."""
        return Summary.of(s.total_ms for s in self.samples)

    @property
    def cached_tokens(self) -> int | None:
        """The most prompt tokens that a reply took from the prefix cache; None where that cannot be known."""
        known = [s.reused_tokens for s in self.samples if s.reused_tokens is not None]
        return max(known) if len(known) == len(self.samples) else None

    # Medians under the names that `Metrics` has for one reply.

    @property
    def ttft_ms(self) -> float:
        """Median time to first token, milliseconds."""
        return _median(self.ttft)

    @property
    def tpot_ms(self) -> float | None:
        """Median time per output token, milliseconds; None for replies of one token."""
        return None if self.tpot is None else self.tpot.p50

    @property
    def total_ms(self) -> float:
        """Median time of a whole reply, milliseconds."""
        return _median(self.total)

    def to_dict(self) -> dict[str, Any]:
        """The medians, every summary and every sample as JSON-ready values."""
        kinds = ("ttft", "engine_ttft", "first_text", "tpot", "engine_tpot", "inter_token", "total")
        summaries = {kind: getattr(self, kind) for kind in kinds}
        return {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "total_ms": self.total_ms,
            "cached_tokens": self.cached_tokens,
            "summaries_ms": {kind: found and found.to_dict() for kind, found in summaries.items()},
            "samples": [s.to_dict() for s in self.samples],
        }


@dataclass(frozen=True, slots=True)
class Measurement(_Samples):
    """Replies of one prompt length.

    Attributes:
        samples: the metrics of each reply, in order.
        prompt_tokens: length of every prompt.
        new_tokens: length of every reply; its limit where replies end naturally.
        finish_reasons: why each reply ended: "length" for a forced length.
        roofline_fraction: how much of the speed that memory allows the median TPOT reaches, 0 to 1; None where it was
            not measured, or replies have one token.
    """

    prompt_tokens: int
    new_tokens: int
    finish_reasons: tuple[FinishReason, ...] = ()
    roofline_fraction: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        about = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "finish_reasons": list(self.finish_reasons),
            "roofline_fraction": self.roofline_fraction,
        }
        return {**about, **_Samples.to_dict(self)}


@dataclass(frozen=True, slots=True)
class ChatTurn(_Samples):
    """One turn of a chat, over several conversations.

    Attributes:
        samples: the metrics of this turn in each conversation.
        turn: its number, from 1.
    """

    turn: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the conversation up to this turn's reply; the median where conversations differ."""
        return round(_median(Summary.of(s.prompt_tokens for s in self.samples)))

    @property
    def prefilled_tokens(self) -> int | None:
        """Prompt tokens that were computed, the others being cached; the median, None where it cannot be known."""
        known = Summary.of(s.prompt_tokens - s.reused_tokens for s in self.samples if s.reused_tokens is not None)
        return None if known is None else round(known.p50)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        about = {
            "turn": self.turn,
            "prompt_tokens": self.prompt_tokens,
            "prefilled_tokens": self.prefilled_tokens,
        }
        return {**about, **_Samples.to_dict(self)}


@dataclass(frozen=True, slots=True)
class Report:
    """What `measure` found, with all that it depends on. Also a sequence of its measurements.

    Attributes:
        measured_at: when, UTC, ISO 8601.
        machine: the machine and the versions.
        device: the device, its driver and capabilities.
        model: the model, how it is stored, and its manifest.
        settings: how it was loaded and measured, with the seed.
        load_ms: all of `load`, milliseconds, and its parts.
        first_inference_ms: the first short inference after loading; None for a pipeline that was in use before.
        warm_inference_ms: the same once more: the difference is what a first request pays.
        measurements: one per prompt length.
        chat: one per turn; empty unless asked for.
        roofline: the limit that memory sets; None unless asked for.
        loaded_memory_bytes: memory of the process before the first measured reply; None where the system does not tell.
        peak_memory_bytes: the most memory of the process up to the last one, loading included; None likewise.
    """

    measured_at: str
    machine: Machine
    device: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    load_ms: dict[str, float]
    first_inference_ms: float | None
    warm_inference_ms: float
    measurements: tuple[Measurement, ...]
    chat: tuple[ChatTurn, ...] = ()
    roofline: Roofline | None = None
    loaded_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.measurements)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    @overload
    def __getitem__(self, index: int) -> Measurement: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Measurement]: ...

    def __getitem__(self, index: int | slice) -> Measurement | Sequence[Measurement]:
        return self.measurements[index]

    def __str__(self) -> str:
        from ov_phi3.bench.text import report_text

        return report_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, every sample included, as JSON-ready values."""
        return {
            "measured_at": self.measured_at,
            "machine": self.machine.to_dict(),
            "device": self.device,
            "model": self.model,
            "settings": self.settings,
            "load_ms": self.load_ms,
            "first_inference_ms": self.first_inference_ms,
            "warm_inference_ms": self.warm_inference_ms,
            "loaded_memory_bytes": self.loaded_memory_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "roofline": self.roofline and asdict(self.roofline),
            "measurements": [m.to_dict() for m in self.measurements],
            "chat": [turn.to_dict() for turn in self.chat],
        }


def _median(found: Summary | None) -> float:
    return float("nan") if found is None else found.p50
