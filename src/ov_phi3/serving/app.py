"""The ASGI app: OpenAI's chat and text completions over HTTP, on one loaded pipeline."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from ov_phi3._version import __version__
from ov_phi3.errors import ConfigError, Error
from ov_phi3.serving import openai_format, openai_requests
from ov_phi3.serving.event_stream import ChatEvents, CompletionEvents, EventStream
from ov_phi3.serving.guard import Guard
from ov_phi3.serving.json_response import JsonResponse
from ov_phi3.serving.metrics import CONTENT_TYPE
from ov_phi3.serving.replies import Busy, ClientGone, Replies, ReplyRunner, until_gone
from ov_phi3.serving.schema import MOST_SESSION_ID, ChatRequest, CompletionRequest, TokenizeRequest
from ov_phi3.serving.sessions import Sessions

if TYPE_CHECKING:
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.serving.openai_requests import ReplyRequest

__all__ = ["MAX_BODY_BYTES", "create_app"]

_log = logging.getLogger("ov_phi3.serving")
MAX_BODY_BYTES = 4 * 2**20
_GONE = 499  # nginx's status for a client that went away; nobody reads it


def create_app(
    pipe: Pipeline,
    model_name: str = "phi-3",
    api_key: str | None = None,
    max_queue: int = 32,
    *,
    max_tokens: int | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_sessions: int = 16,
    max_session_bytes: int = 2 * 2**30,
    timeout: float | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Make an ASGI app that serves a pipeline with OpenAI's API.

    The app never closes the pipeline. At its shutdown it cancels the replies that still run.

    Args:
        pipe: the model, loaded with `concurrency=` for several replies at once.
        model_name: the name that requests call it by.
        api_key: the key that every request but /health and /ready must send; None for none.
        max_queue: replies that may wait; more are answered with 429 and `Retry-After`.
        max_tokens: longest reply, in tokens; default: what the context window leaves.
        max_body_bytes: largest body of a request.
        max_sessions: conversations kept in memory for requests with `session_id`.
        max_session_bytes: size of their copies together; the conversations used least recently go first.
        timeout: longest time of a reply in seconds, the wait included; it then ends with "length".
        cors_origins: origins whose pages may read the answers; none by default.

    Raises:
        ConfigError: a wrong value, or a package of the extra `serve` is missing.
    """
    for name, value, least in (
        ("max_queue", max_queue, 0),
        ("max_tokens", max_tokens, 1),
        ("max_sessions", max_sessions, 0),
        ("max_session_bytes", max_session_bytes, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name}={value!r}; expected a whole number of at least {least}.")
    if api_key is not None and not api_key:
        raise ConfigError("api_key is empty; give a key, or None for a server that anyone may use.")
    runner = ReplyRunner(pipe, max_queue=max_queue, max_tokens=max_tokens, timeout=timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await runner.close()

    # The pages of documentation would load their scripts from elsewhere.
    app = FastAPI(title="ov_phi3", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _Api(pipe, model_name, runner, Sessions(pipe, max_sessions, max_session_bytes)).add_to(app)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


class _Api:
    """The endpoints."""

    def __init__(self, pipe: Pipeline, model_name: str, runner: ReplyRunner, sessions: Sessions) -> None:
        self._pipe = pipe
        self._name = model_name
        self._runner = runner
        self._sessions = sessions
        self._created = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        """Add the endpoints and the handlers of errors."""
        post, get = {"methods": ["POST"], "response_model": None}, {"methods": ["GET"], "response_model": None}
        app.add_api_route("/v1/chat/completions", self.chat, **post)  # type: ignore[arg-type]
        app.add_api_route("/v1/completions", self.complete, **post)  # type: ignore[arg-type]
        app.add_api_route("/tokenize", self.tokenize, **post)  # type: ignore[arg-type]
        app.add_api_route("/v1/models", self.models, **get)  # type: ignore[arg-type]
        app.add_api_route("/v1/models/{model}", self.model, **get)  # type: ignore[arg-type]
        app.add_api_route("/health", self.health, **get)  # type: ignore[arg-type]
        app.add_api_route("/ready", self.ready, **get)  # type: ignore[arg-type]
        app.add_api_route("/metrics", self.metrics, **get)  # type: ignore[arg-type]
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _failed)

    # -- replies -----------------------------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation."""
        given = self._given(body, request)
        return await self._answer(request, "chat", body.model, lambda: openai_requests.chat_request(given))

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        given, tokenizer = self._given(body, request), self._pipe.tokenizer
        return await self._answer(
            request, "completions", body.model, lambda: openai_requests.completion_request(given, tokenizer)
        )

    def _given(self, body: ChatRequest | CompletionRequest, request: Request) -> dict[str, Any]:
        """What a request sets. The session can also be in a header, where load balancers look for it."""
        given = body.model_dump(exclude_unset=True)
        session_id = request.headers.get("x-session-id")
        if session_id and self._sessions.possible:
            given.setdefault("session_id", session_id[:MOST_SESSION_ID])
        return given

    async def _answer(self, request: Request, endpoint: str, model: str, read: Any) -> Response:
        """The answer to a request for replies, whatever happens."""
        response = await self._answer_or_error(request, endpoint, model, read)
        self._runner.metrics.add_request(endpoint, response.status_code)
        return response

    async def _answer_or_error(self, request: Request, endpoint: str, model: str, read: Any) -> Response:
        if model != self._name:
            return JsonResponse(*_unknown_model(model, self._name))
        replies: Replies | None = None
        try:
            wanted = await self._runner.in_thread(read)
            if wanted.session_id is not None:
                self._sessions.check()
            replies = await until_gone(request.receive, self._runner.start(wanted))
            kind = "chatcmpl" if endpoint == "chat" else "cmpl"
            head = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self._name}
            if wanted.stream:
                return self._stream(endpoint, replies, head)
            results = await until_gone(request.receive, replies.results())
            choices = self._choices(endpoint, wanted, results)
            await self._keep_session(replies)
            name = "chat.completion" if endpoint == "chat" else "text_completion"
            return JsonResponse(
                {**head, "object": name, "choices": choices, "usage": openai_format.usage(results, wanted.n)}
            )
        except Busy as exc:
            body = openai_format.error_body(str(exc), "rate_limit_error", code="queue_full")
            return JsonResponse(body, 429, {"retry-after": str(exc.retry_after)})
        except ClientGone:
            return Response(status_code=_GONE)
        except (Error, TypeError) as exc:
            status, body = openai_format.error_of(exc)
            if status == 500:
                _log.exception("a reply failed")
            return JsonResponse(body, status)
        finally:
            if replies is not None and not replies.request.stream:
                await replies.close()

    def _stream(self, endpoint: str, replies: Replies, head: dict[str, Any]) -> Response:
        """The replies as server-sent events."""
        if endpoint == "chat":
            events: Any = ChatEvents(self._pipe, replies, {**head, "object": "chat.completion.chunk"})
        else:
            before = [self._before(replies.request, at) for at in range(replies.request.count)]
            events = CompletionEvents(self._pipe, replies, {**head, "object": "text_completion"}, before)
        return EventStream(replies, events, lambda: self._keep_session(replies))

    def _choices(self, endpoint: str, request: ReplyRequest, results: Sequence[Any]) -> list[dict[str, Any]]:
        tokenizer, end_ids = self._pipe.tokenizer, self._pipe.info.eos_token_ids
        if endpoint == "chat":
            return [openai_format.chat_choice(result, at, tokenizer, end_ids) for at, result in enumerate(results)]
        return [
            openai_format.completion_choice(result, at, tokenizer, end_ids, self._before(request, at))
            for at, result in enumerate(results)
        ]

    def _before(self, request: ReplyRequest, at: int) -> str:
        """The text in front of a reply."""
        return self._pipe.tokenizer.decode(request.prompts[at // request.n]) if request.echo else ""

    async def _keep_session(self, replies: Replies) -> None:
        """Keep the keys and values of the conversation, if the request asks for it."""
        session_id = replies.request.session_id
        if session_id is not None and (results := replies.ended()):
            ids = [*results[0].prompt_token_ids, *results[0].token_ids]
            await self._runner.in_thread(lambda: self._sessions.keep(session_id, ids))

    # -- the rest ----------------------------------------------------------------------------------------------------

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """The token ids of a text, or of messages with the chat template."""
        if (body.prompt is None) == (body.messages is None):
            error = openai_format.error_body("give either prompt or messages.", "invalid_request_error", param="prompt")
            return JsonResponse(error, 400)
        tokenizer = self._pipe.tokenizer

        def encode() -> list[int]:
            if body.prompt is not None:
                return tokenizer.encode(body.prompt).tolist()  # type: ignore[no-any-return]
            ids = tokenizer.encode_messages(body.messages or [], add_generation_prompt=body.add_generation_prompt)
            return ids.tolist()  # type: ignore[no-any-return]

        try:
            tokens = await self._runner.in_thread(encode)
        except (Error, TypeError) as exc:
            status, content = openai_format.error_of(exc)
            return JsonResponse(content, status)
        return JsonResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._pipe.context_length})

    async def models(self) -> Response:
        """The models: one."""
        return JsonResponse({"object": "list", "data": [self._model()]})

    async def model(self, model: str) -> Response:
        """One model."""
        return JsonResponse(self._model()) if model == self._name else JsonResponse(*_unknown_model(model, self._name))

    def _model(self) -> dict[str, Any]:
        window = self._pipe.context_length
        head = {"id": self._name, "object": "model", "created": self._created, "owned_by": "ov_phi3"}
        return {**head, "max_model_len": window}

    async def health(self) -> Response:
        """Whether the process answers, and the model is loaded."""
        closed = self._pipe.engine.closed
        return JsonResponse({"status": "closed" if closed else "ok"}, 503 if closed else 200)

    async def ready(self) -> Response:
        """Whether a reply would be taken now."""
        ready = not self._pipe.engine.closed and not self._runner.full
        counts = {"running": self._runner.running, "waiting": self._runner.waiting}
        return JsonResponse({"status": "ready" if ready else "full", **counts}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Counters in Prometheus' text format."""
        text = self._runner.metrics.text(running=self._runner.running, waiting=self._runner.waiting)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)


def _unknown_model(model: str, known: str) -> tuple[dict[str, Any], int]:
    message = f"the model {model!r} does not exist; this server has {known!r}."
    return openai_format.error_body(message, "invalid_request_error", param="model", code="model_not_found"), 404


async def _invalid(_: Request, exc: Exception) -> Response:
    """A body that does not fit the schema."""
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    error = openai_format.error_body(f"{place}: {first['msg']}", "invalid_request_error", param=place or None)
    return JsonResponse(error, 400)


async def _http_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    headers = dict(exc.headers or {})
    return JsonResponse(openai_format.error_body(str(exc.detail), "invalid_request_error"), exc.status_code, headers)


async def _failed(_: Request, exc: Exception) -> Response:
    status, body = openai_format.error_of(exc)
    return JsonResponse(body, status)
