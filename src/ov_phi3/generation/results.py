"""What a stream yields and what it amounts to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.metrics import Metrics

__all__ = ["Alternative", "FinishReason", "GenerationResult", "Score", "StreamChunk", "TokenLogprob"]

_LARGEST_LOG = 709.0  # exp of more is no float64

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
"""Why a reply ended: an end token or stop string, its length limit, someone cancelled it, or its time was up."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model thought of a token before it was chosen: natural logarithms of probabilities, by the model's own
    logits, before penalties, biases, processors and temperature.

    Attributes:
        token_id: the token.
        logprob: its log-probability.
        top: the likeliest tokens at its place and their log-probabilities, likeliest first; `top_logprobs` of them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {"token_id": self.token_id, "logprob": self.logprob, "top": [list(pair) for pair in self.top]}


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One step of a reply.

    Attributes:
        text: text that is whole now; may be empty while a character or a possible stop string is incomplete.
        token_ids: the step's ids, one or several; the last chunk can have text and no ids.
        finish_reason: on the last chunk why the reply ended, on all others None.
        logprobs: one for each of `token_ids` where `top_logprobs` was given; otherwise empty.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Alternative:
    """One more reply to the same prompt, from beams or several samples.

    Attributes:
        text: its text.
        token_ids: its ids, end token included.
        finish_reason: why it ended.
        score: the engine's score, higher is better.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    score: float


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole reply.

    Attributes:
        text: the reply; special tokens and, unless asked for, the stop string are left out.
        token_ids: its ids as generated, end token included.
        finish_reason: "stop", "length", "cancelled" or "timeout".
        metrics: its latency.
        config: every option as it was used, a drawn seed included.
        prompt_token_ids: the prompt's ids.
        stop_string: the stop string that ended it, or None.
        alternatives: with beams or `num_return_sequences`, all replies, this one first; otherwise empty.
        dropped_messages: in a chat with `overflow="drop_oldest"`, the messages that were dropped to make room for this
            turn, oldest first; otherwise empty.
        logprobs: one for each of `token_ids` where `top_logprobs` was given; otherwise empty.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    metrics: Metrics
    config: GenerationConfig
    prompt_token_ids: list[int] = field(repr=False)
    stop_string: str | None = None
    alternatives: tuple[Alternative, ...] = ()
    dropped_messages: list[dict[str, str]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Everything but the prompt's ids as JSON-ready values."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_string": self.stop_string,
            "metrics": self.metrics.to_dict(),
            "config": self.config.to_dict(),
            "alternatives": [
                {"text": a.text, "token_ids": a.token_ids, "finish_reason": a.finish_reason, "score": a.score}
                for a in self.alternatives
            ],
            "dropped_messages": self.dropped_messages,
            "logprobs": [entry.to_dict() for entry in self.logprobs],
        }


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds a continuation of a prompt.

    Attributes:
        token_ids: the continuation's ids.
        logprobs: the log-probability (natural) of each, given the prompt and all ids before it.
    """

    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation: the sum."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """Exp of the negative mean log-probability; infinite where the model rules a token out."""
        mean = -self.total / len(self.logprobs)
        return math.exp(mean) if mean < _LARGEST_LOG else math.inf
