"""OpenAI's API with Ray Serve: replicas that hold the model, and an entry in front of them that tries again.

Ray Serve sends a request to one replica; if that dies, the request fails. The entry keeps a request until the first
byte of its answer, so that another replica can take it over.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from ov_phi3.backends.registry import backend_spec, concurrency_on
from ov_phi3.errors import ConfigError
from ov_phi3.load_arguments import check_concurrency
from ov_phi3.loading import load
from ov_phi3.serving import openai_format
from ov_phi3.serving.app import MAX_BODY_BYTES, create_app
from ov_phi3.serving.guard import Message, Receive, Scope, Send
from ov_phi3.serving.json_response import JsonResponse
from ov_phi3.serving.ray.batches import actor_properties
from ov_phi3.serving.ray.model_source import fetch_model
from ov_phi3.serving.replies import ClientGone, until_gone

__all__ = ["deployment"]

_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError)
_TRIES = 5  # replicas that a request is sent to before it is given up
_SESSION_HEADER = b"x-session-id"
_REPLICA_HEADER = b"x-replica-id"
_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
_HEALTH_S = 30.0
_CONCURRENCY = 8
_ENTRY_GRACE_S = 5.0  # the entry passes on what a replica sends while it is drained


def deployment(
    model_dir: str | os.PathLike[str],
    *,
    model_name: str = "phi-3",
    api_key: str | None = None,
    concurrency: int | None = None,
    max_queue: int = 32,
    replicas: int | tuple[int, int] = 1,
    num_cpus: float = 1,
    entries: int = 1,
    sessions: bool = True,
    drain: float = 30.0,
    manifest_sha256: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    prefixes: Sequence[str | os.PathLike[str]] = (),
    app_options: Mapping[str, Any] | None = None,
    ray_actor_options: Mapping[str, Any] | None = None,
    **load_options: Any,
) -> serve.Application:
    """Make an application for `ray.serve.run`: the app of `create_app` on any number of replicas.

    Args:
        model_dir: directory of the model, on every node or shared; with `manifest_sha256`, where to copy it from.
        model_name: the name that requests call it by.
        api_key: the key that requests must send; None for none.
        concurrency: replies at once in each replica; default: 8, or 1 with `backend="llm_pipeline"`.
        max_queue: requests that wait in each entry for a replica; more are answered with 429.
        replicas: their number; or the least and the most of them, between which Ray scales by the number of requests.
        num_cpus: CPUs of each replica, and threads of its engine on a CPU.
        entries: processes that take requests. They use little; one is enough but for its node's failure.
        sessions: send all requests with the same `session_id`, or header `x-session-id`, to one replica, which has the
            conversation in its cache. Others go to a replica by chance. Without, they go to the less busy of two.
        drain: seconds that running replies have to end when a replica is stopped.
        manifest_sha256: copy the model to the node's own disk first, see `fetch_model`.
        cache_dir: where these copies are kept.
        prefixes: files of saved prefixes in shared storage, see `BatchGenerator`.
        app_options: further arguments of `create_app`.
        ray_actor_options: further resources of a replica, such as `{"resources": {"edge": 1}}`.
        **load_options: of `ov_phi3.load`; the backend is "infer_request" by default.

    Raises:
        ConfigError: `replicas` is not as above, or there is no backend that runs so many replies at once.
        TypeError: `concurrency` is not a whole number.
    """
    load_options, concurrency = _load_options(load_options, concurrency)
    how = {
        "max_queued_requests": max_queue,
        "graceful_shutdown_timeout_s": drain,
        "ray_actor_options": {**(ray_actor_options or {}), "num_cpus": num_cpus},
    }
    model = serve.deployment(**how, **_model_options(replicas, concurrency, sessions=sessions))(Replica).bind(
        os.fspath(model_dir),
        {"manifest_sha256": manifest_sha256, "cache_dir": cache_dir} if manifest_sha256 else None,
        [os.fspath(file) for file in prefixes],
        {"model_name": model_name, "api_key": api_key, **(app_options or {})},
        load_options,
    )
    most = max_queue + concurrency * (replicas if isinstance(replicas, int) else replicas[1])
    limit = int((app_options or {}).get("max_body_bytes", MAX_BODY_BYTES))
    return serve.deployment(**_entry_options(entries, most, drain))(serve.ingress()(Entry)).bind(model, limit)


def _load_options(given: Mapping[str, Any], concurrency: int | None) -> tuple[dict[str, Any], int]:
    """The complete options of `load`, and the number of replies at once."""
    backend = given.get("backend") or "infer_request"
    concurrency = concurrency_on(backend, concurrency, _CONCURRENCY)
    check_concurrency(concurrency, backend_spec(backend))
    return {**given, "backend": backend, "concurrency": concurrency}, concurrency


def _entry_options(entries: int, most_requests: int, drain: float) -> dict[str, Any]:
    """How Ray runs the entries."""
    return {
        "name": "Entry",
        "num_replicas": entries,
        "max_ongoing_requests": 2 * most_requests,  # the replicas' limits refuse what is too much
        "graceful_shutdown_timeout_s": drain + _ENTRY_GRACE_S,
        "ray_actor_options": {"num_cpus": 0},
    }


def _model_options(replicas: int | tuple[int, int], concurrency: int, *, sessions: bool) -> dict[str, Any]:
    """How Ray runs the replicas."""
    least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 0 <= least <= most or not most:
        raise ConfigError(f"replicas={replicas!r}; expected a number of at least 1, or the least and the most.")
    options: dict[str, Any] = {
        "name": "Model",
        "max_ongoing_requests": concurrency,
        "health_check_timeout_s": _HEALTH_S,
    }
    if sessions:
        options["request_router_config"] = RequestRouterConfig(request_router_class=_ROUTER)
    if least == most:
        return {**options, "num_replicas": least}
    # Below the full width, so that a new replica starts before requests wait.
    wanted = max(1.0, 0.75 * concurrency)
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": wanted}
    return {**options, "autoscaling_config": scaling}


class Replica:
    """One loaded model with the app of `create_app`; arguments as `deployment` makes them."""

    def __init__(
        self,
        model_dir: str,
        fetch: Mapping[str, Any] | None,
        prefixes: Sequence[str],
        app_options: Mapping[str, Any],
        load_options: Mapping[str, Any],
    ) -> None:
        path = model_dir if fetch is None else fetch_model(model_dir, **fetch)
        properties = actor_properties(load_options, exact=False)
        self._pipe = load(path, **{**load_options, "ov_config": properties})
        self._prefixes = [self._pipe.load_prefix(file) for file in prefixes]
        self._app = create_app(self._pipe, **app_options)
        self._running = 0
        self._id = str(serve.get_replica_context().replica_id.unique_id)
        self._pipe.warmup()

    async def respond(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Run the app for one request; yields its ASGI messages. Closing the iterator cancels the reply."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        incoming: asyncio.Queue[Message] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def run() -> None:
            try:
                await self._app(scope, incoming.get, messages.put)
            finally:
                messages.put_nowait(None)

        self._running += 1
        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (_REPLICA_HEADER, self._id.encode())]}
                yield message
            await task
        finally:
            incoming.put_nowait({"type": "http.disconnect"})  # ends the replies, and with them the task
            with suppress(Exception):
                await asyncio.shield(task)
            self._running -= 1

    async def check_health(self) -> None:
        """Called by Ray. Computes a token, unless replies are computed already."""
        self._pipe.engine.check_open()
        if not self._running:
            await asyncio.to_thread(self._pipe.generate, "Hi", max_new_tokens=1, timeout=_HEALTH_S / 2)

    def __del__(self) -> None:
        if hasattr(self, "_pipe"):
            self._pipe.close()


class Entry:
    """Takes HTTP requests and sends them to replicas.

    Args:
        replicas: a handle of them.
        most: bytes that are read of a body.
    """

    def __init__(self, replicas: DeploymentHandle, most: int) -> None:
        self._replicas = replicas
        self._most = most

    def __serve_build_asgi_app__(self) -> Forwarder:
        return Forwarder(self._replicas, self._most)


class Forwarder:
    """An ASGI app that forwards each request, and again to another replica if one dies before it has answered."""

    def __init__(self, replicas: DeploymentHandle, most: int) -> None:
        self._replicas = replicas
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        parts: list[bytes] = []
        more = True
        while more and sum(map(len, parts)) <= self._most:  # the app refuses a longer body
            message = await receive()
            if message["type"] != "http.request":
                return
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        with suppress(ClientGone):
            await until_gone(receive, self._forward(scope, body, receive, send))

    async def _forward(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        plain = {name: scope[name] for name in _SCOPE if name in scope}
        session = _session_of(scope, body)
        handle = self._replicas.options(stream=True, **({"session_id": session} if session else {}))
        for _ in range(_TRIES):
            answer = _Answer(send)
            replies = handle.respond.remote(plain, body)
            try:
                async for message in replies:
                    await answer.send(message)
            except BackPressureError as error:
                refusal = openai_format.error_body(str(error), "rate_limit_error", code="queue_full")
                await JsonResponse(refusal, 429, {"retry-after": "1"})(scope, receive, send)
            except _LOST:
                if not answer.begun:
                    continue
                await answer.break_off()
            except RayTaskError as error:
                if not answer.begun:
                    await JsonResponse(openai_format.error_of(error)[1], 500)(scope, receive, send)
                raise
            except asyncio.CancelledError:
                replies.cancel()
                raise
            return
        refusal = openai_format.error_body(
            f"{_TRIES} replicas died with this request.", "server_error", code="replica_died"
        )
        await JsonResponse(refusal, 503)(scope, receive, send)


class _Answer:
    """The answer to one request. Its head waits for the first byte of the body: until then, nothing is sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self.begun = False

    async def send(self, message: Message) -> None:
        """Pass on a message of the app."""
        if not self.begun and message["type"] == "http.response.start":
            self._head = message
            return
        if not self.begun and self._head is not None:
            self.begun = True
            await self._send(self._head)
        await self._send(message)

    async def break_off(self) -> None:
        """End an answer whose replica has died: an event with the error if it is a stream."""
        headers = dict(self._head["headers"]) if self._head is not None else {}
        if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            raise ConnectionError("the replica died while it answered")
        error = openai_format.error_body(
            "the replica died while it replied; ask again.", "server_error", code="replica_died"
        )
        data = f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


def _session_of(scope: Scope, body: bytes) -> str | None:
    """The session of a request: of its header, or of its body."""
    for name, value in scope["headers"]:
        if name == _SESSION_HEADER:
            return bytes(value).decode("latin-1")
    if b'"session_id"' not in body:
        return None
    with suppress(ValueError, RecursionError):
        value = json.loads(body)
        session = value.get("session_id") if isinstance(value, dict) else None
        return session if isinstance(session, str) else None
    return None


def _died(message: str) -> dict[str, Any]:
    return openai_format.error_body(message, "server_error", code="replica_died")
