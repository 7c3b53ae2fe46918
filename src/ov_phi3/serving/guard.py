"""ASGI middleware: the API key and the size of bodies."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from ov_phi3.serving.json_response import JsonResponse
from ov_phi3.serving.openai_format import error_body

__all__ = ["ASGIApp", "Guard", "Message", "Receive", "Scope", "Send"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = ("/health", "/ready")  # for orchestrators, which have no key


class Guard:
    """Refuses requests without the API key, and bodies that are too large, before they are parsed.

    Args:
        app: the application.
        api_key: the key; None for none.
        max_body_bytes: largest body of a request.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if self._expected is not None and scope["path"] not in _OPEN and not is_preflight:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
                refusal = _error(401, message, "invalid_api_key", {"www-authenticate": "Bearer"})
                await refusal(scope, receive, send)
                return
        body = await self._body(headers, receive)
        if body is None:
            message = f"the body is larger than {self._max} bytes; send a smaller one."
            await _error(413, message, "body_too_large", {"connection": "close"})(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None if it is too large."""
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max:
            return None
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone: nobody will read the answer
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


def _error(status: int, message: str, code: str, headers: dict[str, str]) -> JsonResponse:
    return JsonResponse(error_body(message, "invalid_request_error", code=code), status, headers)
