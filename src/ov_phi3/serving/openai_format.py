"""Replies and errors in the shapes of OpenAI's API, as JSON-ready dicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ClosedError, ContextOverflowError, Error, GenerationError, StreamError

if TYPE_CHECKING:
    from ov_phi3.generation.results import FinishReason, GenerationResult, TokenLogprob
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = [
    "chat_choice",
    "chat_logprobs",
    "completion_choice",
    "completion_logprobs",
    "error_body",
    "error_of",
    "finish_reason",
    "usage",
]

_LOWEST = -9999.0  # what OpenAI writes for a probability of 0, which JSON cannot hold


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(exc: BaseException) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body for an exception of the library."""
    message = " ".join(str(exc).split())
    if isinstance(exc, ContextOverflowError):
        # OpenAI's words, by which clients such as LiteLLM know this error; they do not look at the code.
        message = f"This model's maximum context length is exceeded: {message}"
        return 400, error_body(message, "invalid_request_error", param="messages", code="context_length_exceeded")
    if isinstance(exc, ClosedError):
        return 503, error_body(message, "server_error", code="closed")
    if isinstance(exc, (GenerationError, StreamError)):
        return 500, error_body(message, "server_error", code="generation_failed")
    if isinstance(exc, (Error, TypeError)):
        return 400, error_body(message, "invalid_request_error")
    return 500, error_body("the server failed; its log has the reason.", "server_error")


def finish_reason(reason: FinishReason) -> str:
    """Why a reply ended, in OpenAI's words."""
    return reason if reason in ("stop", "tool_calls") else "length"


def usage(results: Sequence[GenerationResult], n: int) -> dict[str, Any]:
    """The tokens of a request: each prompt counts once, whatever the number of replies to it."""
    firsts = results[::n]
    prompt = sum(len(result.prompt_token_ids) for result in firsts)
    completion = sum(len(result.token_ids) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.metrics.reused_tokens or 0 for result in firsts)},
    }


def chat_choice(result: GenerationResult, index: int, tokenizer: Tokenizer, end_ids: Sequence[int]) -> dict[str, Any]:
    """One choice of a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    if result.tool_calls:
        calls = [call.to_dict() for call in result.tool_calls]
        message |= {"content": result.text or None, "tool_calls": calls}
    logprobs = None
    if result.config.top_logprobs is not None:
        logprobs = chat_logprobs(result.logprobs, tokenizer, end_ids)
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason(result.finish_reason),
    }


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer, end_ids: Sequence[int]) -> dict[str, Any]:
    """The log-probabilities of a chat completion; the end token, which has no text, is left out."""
    content = [
        {
            **_token(entry.token_id, entry.logprob, tokenizer),
            "top_logprobs": [_token(token, logprob, tokenizer) for token, logprob in entry.top],
        }
        for entry in entries
        if entry.token_id not in end_ids
    ]
    return {"content": content, "refusal": None}


def completion_choice(
    result: GenerationResult, index: int, tokenizer: Tokenizer, end_ids: Sequence[int], before: str = ""
) -> dict[str, Any]:
    """One choice of a text completion; `before` is the prompt, if it is to be repeated."""
    logprobs = None
    if result.config.top_logprobs is not None:
        logprobs = completion_logprobs(result.logprobs, tokenizer, end_ids, offset=len(before))
    text = before + result.text
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(result.finish_reason)}


def completion_logprobs(
    entries: Iterable[TokenLogprob], tokenizer: Tokenizer, end_ids: Sequence[int], *, offset: int = 0
) -> dict[str, Any]:
    """The log-probabilities of a text completion. `offset`: characters before the first of these tokens."""
    kept = [entry for entry in entries if entry.token_id not in end_ids]
    texts = [_text(entry.token_id, tokenizer) for entry in kept]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(entry.logprob) for entry in kept],
        "top_logprobs": [{_text(token, tokenizer): _finite(value) for token, value in entry.top} for entry in kept],
        "text_offset": [offset + sum(map(len, texts[:at])) for at in range(len(texts))],
    }


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = _bytes(token_id, tokenizer)
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _text(token_id: int, tokenizer: Tokenizer) -> str:
    return _bytes(token_id, tokenizer).decode("utf-8", "replace")


def _bytes(token_id: int, tokenizer: Tokenizer) -> bytes:
    names = (name for name, token in tokenizer.control_tokens.items() if token == token_id)
    return tokenizer.token_bytes(token_id) or next(names, "").encode()


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
