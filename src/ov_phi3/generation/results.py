"""Values that generation returns: chunks of a stream, whole replies, scores."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.metrics import Metrics
from ov_phi3.text.tool_calls import ToolCall

__all__ = ["Alternative", "FinishReason", "GenerationResult", "Score", "StreamChunk", "TokenLogprob"]

_MAX_EXPONENT = 709.0  # exp of more overflows a float64
_SHOWN_TEXT = 60  # characters of a reply in its repr

FinishReason = Literal["stop", "tool_calls", "length", "cancelled", "timeout", "loop"]
"""Why a reply ended: an end token or stop string, the same behind tool calls, its length limit, cancellation, its
`timeout`, or `stop_on_loop`."""


def shortened(text: str, width: int = _SHOWN_TEXT) -> str:
    """The repr of a text, in one line of limited width."""
    return repr(text if len(text) <= width else f"{text[: width - 4]} ...")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a generated token: the natural logarithm of its probability by the model's own logits, before
    penalties, biases, processors and temperature.

    Attributes:
        token_id: the token.
        logprob: its log-probability.
        top: the most likely tokens at its position and their log-probabilities, in descending order; `top_logprobs` of
            them.
        bytes: the bytes that the token adds to a text; of a special token its name.
        top_bytes: those of the tokens in `top`.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    bytes: builtins.bytes = b""
    top_bytes: tuple[builtins.bytes, ...] = ()

    @property
    def text(self) -> str:
        """`bytes` as text; an incomplete character is U+FFFD."""
        return self.bytes.decode("utf-8", "replace")

    @property
    def candidates(self) -> tuple[TokenLogprob, ...]:
        """The tokens of `top`, each with its text and bytes."""
        several = zip(self.top, self.top_bytes or (b"",) * len(self.top), strict=True)
        return tuple(TokenLogprob(token_id, logprob, bytes=data) for (token_id, logprob), data in several)

    def with_bytes(self, token_bytes: Callable[[int], builtins.bytes]) -> TokenLogprob:
        """The same with the bytes of its tokens, which `token_bytes` returns."""
        top_bytes = tuple(token_bytes(token_id) for token_id, _ in self.top)
        return replace(self, bytes=token_bytes(self.token_id), top_bytes=top_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values: bytes as lists of numbers, as in OpenAI's API."""
        return {
            "token_id": self.token_id,
            "logprob": self.logprob,
            "text": self.text,
            "bytes": list(self.bytes),
            "top": [list(pair) for pair in self.top],
            "top_text": [candidate.text for candidate in self.candidates],
            "top_bytes": [list(data) for data in self.top_bytes],
        }


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One step of a reply.

    Attributes:
        text: text that can be shown now; empty while a character or a possible stop string is incomplete.
        token_ids: ids of the step, one or several; the last chunk can have text and no ids.
        finish_reason: why the reply ended, on the last chunk; None on all others.
        logprobs: one for each of `token_ids` if `top_logprobs` is given; otherwise empty.
        tool_calls: calls that this step completed; their text is not in any chunk.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of several replies to the same prompt, from beams or samples.

    Attributes:
        text: the reply.
        token_ids: its ids, end token included.
        finish_reason: why it ended.
        score: the engine's score; higher is better.
        tool_calls: the tools that it calls.
        parsed: see `GenerationResult`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    score: float
    tool_calls: tuple[ToolCall, ...] = ()
    parsed: Any = None

    def __repr__(self) -> str:
        return f"<Alternative {shortened(self.text)}: {self.finish_reason}, score {self.score:.3f}>"


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole reply.

    Attributes:
        text: the reply, without special tokens, and without the stop string unless `include_stop` is set; without the
            text of `tool_calls`.
        token_ids: its ids as generated, end token included.
        finish_reason: "stop", "tool_calls", "length", "cancelled", "timeout" or "loop".
        metrics: its latency.
        config: all options as used, including a drawn seed.
        prompt_token_ids: ids of the prompt.
        stop_string: the stop string that ended the reply, or None.
        alternatives: with beams or `num_return_sequences`, all replies, this one first; otherwise empty.
        dropped_messages: in a chat with `overflow="drop_oldest"`, the messages dropped to make room for this turn,
            oldest first; otherwise empty.
        logprobs: one for each of `token_ids` if `top_logprobs` is given; otherwise empty.
        tool_calls: the tools that the reply calls, in order; () for none. A reply with calls that ended by itself has
            the finish reason "tool_calls".
        parsed: with `json_schema`, the value of the JSON, or an object of the pydantic model class; None without a
            schema, and if the reply was cut off.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    metrics: Metrics
    config: GenerationConfig
    prompt_token_ids: list[int] = field(repr=False)
    stop_string: str | None = None
    alternatives: tuple[Alternative, ...] = ()
    dropped_messages: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list, repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    parsed: Any = field(default=None, repr=False)

    def __repr__(self) -> str:
        calls = f"{len(self.tool_calls)} tool calls, " if self.tool_calls else ""
        return f"<GenerationResult {shortened(self.text)}: {calls}{self.finish_reason} after {self.metrics}>"

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        """The reply as a notebook shows it."""
        calls = "".join(f"\n\n    {call.name}({call.arguments})" for call in self.tool_calls)
        return f"{self.text}{calls}\n\n---\n*{self.finish_reason} after {self.metrics}*"

    def to_dict(self) -> dict[str, Any]:
        """Everything except the prompt's ids, as JSON-ready values."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_string": self.stop_string,
            "metrics": self.metrics.to_dict(),
            "config": self.config.to_dict(),
            "alternatives": [
                {
                    "text": a.text,
                    "token_ids": a.token_ids,
                    "finish_reason": a.finish_reason,
                    "score": a.score,
                    "tool_calls": [call.to_dict() for call in a.tool_calls],
                }
                for a in self.alternatives
            ],
            "dropped_messages": self.dropped_messages,
            "logprobs": [entry.to_dict() for entry in self.logprobs],
            "tool_calls": [call.to_dict() for call in self.tool_calls],
        }


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a continuation, given a prompt.

    Attributes:
        token_ids: ids of the continuation.
        logprobs: natural log-probability of each id, given the prompt and all ids before it.
    """

    token_ids: list[int]
    logprobs: list[float]

    def __repr__(self) -> str:
        return f"<Score of {len(self.token_ids)} tokens: log-probability {self.total:.3f}>"

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation: the sum."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """Exp of the negative mean log-probability; infinite if a token has probability 0."""
        mean = -self.total / len(self.logprobs)
        return math.exp(mean) if mean < _MAX_EXPONENT else math.inf
