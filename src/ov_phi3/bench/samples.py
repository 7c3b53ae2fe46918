"""Replies measured under equal conditions: their metrics and the summaries of these metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ov_phi3.bench.summary import Summary
from ov_phi3.generation.metrics import Metrics
from ov_phi3.generation.results import FinishReason

__all__ = ["ChatTurn", "Measurement"]


@dataclass(frozen=True, slots=True)
class _Samples:
    """Metrics of replies measured under equal conditions.

    Attributes:
        samples: the metrics of each reply, in order.
    """

    samples: tuple[Metrics, ...]

    @property
    def ttft(self) -> Summary | None:
        """Time to first token (TTFT), from the request until the caller has the token, milliseconds."""
        return Summary.of(s.ttft_ms for s in self.samples)

    @property
    def engine_ttft(self) -> Summary | None:
        """Time to first token by the engine's own clock, milliseconds."""
        return Summary.of(s.engine_ttft_ms for s in self.samples)

    @property
    def first_text(self) -> Summary | None:
        """Time from the request to the first text that can be shown, milliseconds."""
        return Summary.of(s.first_text_ms for s in self.samples)

    @property
    def tpot(self) -> Summary | None:
        """Time per output token (TPOT) of each reply, milliseconds; None for replies of one token."""
        return Summary.of(s.tpot_ms for s in self.samples)

    @property
    def engine_tpot(self) -> Summary | None:
        """Mean gap between tokens by the engine's own clock, milliseconds."""
        return Summary.of(s.engine_tpot_ms for s in self.samples)

    @property
    def inter_token(self) -> Summary | None:
        """All gaps between two tokens of all replies, milliseconds; the percentiles show outliers that a mean hides."""
        return Summary.of(gap for s in self.samples for gap in s.inter_token_ms)

    @property
    def total(self) -> Summary | None:
        """Time from the request to the end of the reply, milliseconds."""
        return Summary.of(s.total_ms for s in self.samples)

    @property
    def cached_tokens(self) -> int | None:
        """Largest number of prompt tokens that a reply reused from the prefix cache; None if a reply does not say."""
        reused = [s.reused_tokens for s in self.samples if s.reused_tokens is not None]
        return max(reused) if len(reused) == len(self.samples) else None

    # Medians under the names that `Metrics` has for one reply.

    @property
    def ttft_ms(self) -> float:
        """Median time to first token, milliseconds; NaN without samples."""
        return _median(self.ttft)

    @property
    def tpot_ms(self) -> float | None:
        """Median time per output token, milliseconds; None for replies of one token."""
        return None if self.tpot is None else self.tpot.p50

    @property
    def total_ms(self) -> float:
        """Median time of a complete reply, milliseconds; NaN without samples."""
        return _median(self.total)

    def to_dict(self) -> dict[str, Any]:
        """The medians, all summaries and all samples as JSON-ready values."""
        kinds = ("ttft", "engine_ttft", "first_text", "tpot", "engine_tpot", "inter_token", "total")
        summaries = {kind: getattr(self, kind) for kind in kinds}
        return {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "total_ms": self.total_ms,
            "cached_tokens": self.cached_tokens,
            "summaries_ms": {kind: summary and summary.to_dict() for kind, summary in summaries.items()},
            "samples": [s.to_dict() for s in self.samples],
        }


@dataclass(frozen=True, slots=True)
class Measurement(_Samples):
    """Replies to prompts of one length.

    Attributes:
        samples: the metrics of each reply, in order.
        prompt_tokens: length of every prompt.
        new_tokens: length of every reply; the upper limit if replies end naturally.
        finish_reasons: the finish reason of each reply: "length" for a forced length.
        roofline_fraction: the median TPOT as a fraction of the speed that memory bandwidth allows, 0 to 1; None if it
            was not measured, or for replies of one token.
    """

    prompt_tokens: int
    new_tokens: int
    finish_reasons: tuple[FinishReason, ...] = ()
    roofline_fraction: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, medians, summaries and samples as JSON-ready values."""
        fields = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "finish_reasons": list(self.finish_reasons),
            "roofline_fraction": self.roofline_fraction,
        }
        return {**fields, **_Samples.to_dict(self)}


@dataclass(frozen=True, slots=True)
class ChatTurn(_Samples):
    """One turn of a chat, measured in several conversations.

    Attributes:
        samples: the metrics of this turn in each conversation.
        turn: number of the turn, from 1.
    """

    turn: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the conversation before this turn's reply; the median of the conversations."""
        return round(_median(Summary.of(s.prompt_tokens for s in self.samples)))

    @property
    def prefilled_tokens(self) -> int | None:
        """Prompt tokens that were prefilled rather than reused from the cache; the median, None if unknown."""
        prefilled = Summary.of(s.prompt_tokens - s.reused_tokens for s in self.samples if s.reused_tokens is not None)
        return None if prefilled is None else round(prefilled.p50)

    def to_dict(self) -> dict[str, Any]:
        """All fields, medians, summaries and samples as JSON-ready values."""
        fields = {
            "turn": self.turn,
            "prompt_tokens": self.prompt_tokens,
            "prefilled_tokens": self.prefilled_tokens,
        }
        return {**fields, **_Samples.to_dict(self)}


def _median(summary: Summary | None) -> float:
    return float("nan") if summary is None else summary.p50
