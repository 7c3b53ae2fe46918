"""The bodies of requests, as pydantic models: the types that the OpenAPI schema names.

Options of a reply are checked by `GenerationConfig`; here they only pass, under OpenAI's names or this library's.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MOST_SESSION_ID", "ChatRequest", "CompletionRequest", "StreamOptions", "TokenizeRequest"]

MOST_SESSION_ID = 256
"""Longest `session_id`, in characters."""


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = Field(False, description="end the stream with a chunk that has the usage and no choices")


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")  # all options of a reply; an unknown one is refused with its name

    model: str = Field(description="the name that GET /v1/models gives")
    n: int | None = Field(None, ge=1, le=128, description="replies to one prompt")
    stream: bool | None = Field(None, description="send the reply as server-sent events")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="longest reply, in tokens")
    temperature: float | None = Field(None, description="0 is greedy; default: the model's own options")
    top_p: float | None = None
    seed: int | None = Field(None, description="makes a sampled reply reproducible")
    stop: str | list[str] | None = Field(None, description="strings that end the reply")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="token id -> number added to its logit")
    session_id: str | None = Field(
        None,
        min_length=1,
        max_length=MOST_SESSION_ID,
        description="keep the keys and values of this conversation in the cache",
    )


class ChatRequest(_Request):
    """A request of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, description="the conversation")
    max_completion_tokens: int | None = Field(None, description="the same as max_tokens")
    response_format: dict[str, Any] | None = Field(None, description="text, json_object or json_schema")
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    continue_final_message: bool | None = Field(None, description="go on with the last message, the assistant's")


class CompletionRequest(_Request):
    """A request of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="texts, without a chat template and without control tokens, or token ids"
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(None, description="put the prompt in front of the reply")


class TokenizeRequest(BaseModel):
    """A request of /tokenize: a text or messages."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
