"""Replies as server-sent events, in the shapes of OpenAI's streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ov_phi3.serving import openai_format
from ov_phi3.serving.json_response import JsonResponse
from ov_phi3.serving.replies import ClientGone, Replies, until_gone

if TYPE_CHECKING:
    from ov_phi3.generation.results import StreamChunk
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.serving.guard import Receive, Scope, Send

__all__ = ["ChatEvents", "CompletionEvents", "EventStream"]


class ChatEvents:
    """The events of a chat completion.

    Args:
        pipe: the model.
        replies: its replies.
        head: what all events have: id, object, created, model.
    """

    def __init__(self, pipe: Pipeline, replies: Replies, head: dict[str, Any]) -> None:
        self._replies = replies
        self._head = head
        self._tokenizer, self._end_ids = pipe.tokenizer, pipe.info.eos_token_ids

    async def __call__(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events."""
        request = self._replies.request
        calls = [0] * request.count
        begun: set[int] = set()
        async for at, chunk in self._replies.chunks():
            if at not in begun:
                begun.add(at)
                yield self._event(at, {"role": "assistant", "content": ""})
            logprobs = None
            if chunk.logprobs:
                logprobs = openai_format.chat_logprobs(chunk.logprobs, self._tokenizer, self._end_ids)
            if chunk.text or logprobs:
                yield self._event(at, {"content": chunk.text}, logprobs=logprobs)
            for call in chunk.tool_calls:
                yield self._event(at, {"tool_calls": [{"index": calls[at], **call.to_dict()}]})
                calls[at] += 1
            if chunk.finish_reason is not None:
                yield self._event(at, {}, finish_reason=openai_format.finish_reason(chunk.finish_reason))
        if request.include_usage:
            results = await self._replies.results()
            yield {**self._head, "choices": [], "usage": openai_format.usage(results, request.n)}

    def _event(
        self,
        at: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}


class CompletionEvents:
    """The events of a text completion; arguments as for `ChatEvents`, and the texts that are repeated in front.

    Args:
        pipe: the model.
        replies: its replies.
        head: what all events have: id, object, created, model.
        before: the text in front of each reply.
    """

    def __init__(self, pipe: Pipeline, replies: Replies, head: dict[str, Any], before: list[str]) -> None:
        self._replies = replies
        self._head = head
        self._tokenizer, self._end_ids = pipe.tokenizer, pipe.info.eos_token_ids
        self._before = before

    async def __call__(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events."""
        request = self._replies.request
        offsets = [len(text) for text in self._before]
        for at, text in enumerate(self._before):
            if text:
                yield self._event(at, text, None, None)
        async for at, chunk in self._replies.chunks():
            logprobs = self._logprobs(chunk, offsets, at)
            reason = chunk.finish_reason and openai_format.finish_reason(chunk.finish_reason)
            if chunk.text or logprobs or reason:
                yield self._event(at, chunk.text, logprobs, reason)
        if request.include_usage:
            results = await self._replies.results()
            yield {**self._head, "choices": [], "usage": openai_format.usage(results, request.n)}

    def _logprobs(self, chunk: StreamChunk, offsets: list[int], at: int) -> dict[str, Any] | None:
        if not chunk.logprobs:
            return None
        logprobs = openai_format.completion_logprobs(chunk.logprobs, self._tokenizer, self._end_ids, offset=offsets[at])
        offsets[at] += sum(map(len, logprobs["tokens"]))
        return logprobs

    def _event(self, at: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": at, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice]}


class EventStream(Response):
    """The HTTP response. It cancels the replies when the client goes away.

    Args:
        replies: the replies.
        events: makes the events.
        on_done: run when all replies have ended without an error.
    """

    def __init__(
        self,
        replies: Replies,
        events: Callable[[], AsyncIterator[dict[str, Any]]],
        on_done: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        self._replies = replies
        self._events = events
        self._on_done = on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await until_gone(receive, self._send_all(scope, receive, send))
        except (ClientGone, OSError):
            pass
        finally:
            await self._replies.close()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._events()
        try:
            event = await anext(events, None)
        except Exception as exc:  # noqa: BLE001 - nothing has been sent: the error has its status
            status, body = openai_format.error_of(exc)
            await JsonResponse(body, status)(scope, receive, send)
            return
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while event is not None:
                await _send(send, json.dumps(event))
                event = await anext(events, None)
        except Exception as exc:  # noqa: BLE001 - the status has been sent: the client gets an event with the error
            await _send(send, json.dumps(openai_format.error_of(exc)[1]))
        else:
            await self._on_done()
        await _send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
