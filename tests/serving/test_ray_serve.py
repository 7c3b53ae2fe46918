"""The server under Ray Serve: OpenAI's client, sessions that stay with their replica, a replica killed under load."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import ov_phi3

KEY = "a-key-for-the-tests"
NAME = f"phi-{os.getpid()}"
pytestmark = pytest.mark.filterwarnings("default")  # of Ray's own


@pytest.fixture(scope="module")
def client(tiny_fp32: Path, device: str) -> Iterator[openai.OpenAI]:
    """A client of an application with two replicas."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    if sys.platform == "win32":
        pytest.skip("Ray on Windows is experimental")
    from ray import serve

    from ov_phi3.serving.ray import deployment

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = deployment(tiny_fp32, replicas=2, concurrency=4, api_key=KEY, device=device, drain=30)
        serve.run(app, name=NAME)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client: openai.OpenAI, content: str, **options: Any) -> Any:
    options = {"max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": content}], **options}
    return client.chat.completions.create(model="phi-3", **options)


def replica_of(client: openai.OpenAI, session: str) -> str:
    """The id of the replica that answers a session's requests."""
    models = client.models.with_raw_response.list(extra_headers={"x-session-id": session})
    return str(models.headers["x-replica-id"])


def running(client: openai.OpenAI, session: str) -> int:
    """The replies that this replica computes."""
    ready = httpx.get(str(client.base_url.join("/ready")), headers={"x-session-id": session}, timeout=60)
    return int(ready.json()["running"])


def test_the_app_answers_as_under_uvicorn(client: openai.OpenAI, tiny_batch: ov_phi3.Pipeline) -> None:
    expected = tiny_batch.generate("Hi", max_new_tokens=4, temperature=0).text
    assert ask(client, "Hi").choices[0].message.content == expected
    events = list(ask(client, "Hi", stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected
    assert [model.id for model in client.models.list()] == ["phi-3"]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="context window"):
            ask(client, "Hi", max_tokens=10**6, stream=stream)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize("how", ["body", "header"])
def test_a_session_stays_with_its_replica(client: openai.OpenAI, how: str) -> None:
    chosen = set()
    for session in range(6):
        name = f"{how}-{session}"
        where: dict[str, Any] = {"extra_headers": {"x-session-id": name}}
        if how == "body":
            where = {"extra_body": {"session_id": name}}
        messages = [{"role": "user", "content": f"Session {name}. " + "Tell me more. " * 20}]
        seen = 0
        for _ in range(3):
            raw = client.chat.completions.with_raw_response.create(
                model="phi-3", messages=messages, max_tokens=4, temperature=0, **where
            )
            reply = raw.parse()
            assert raw.headers["x-replica-id"] == replica_of(client, name)
            assert reply.usage.prompt_tokens_details.cached_tokens >= seen
            seen = reply.usage.prompt_tokens - 1
            messages += [
                {"role": "assistant", "content": reply.choices[0].message.content},
                {"role": "user", "content": "And then?"},
            ]
        chosen.add(replica_of(client, name))
    # The ring of hashes gives each replica a part of the sessions, by chance a small one.
    for session in range(6, 200):
        if len(chosen) == 2:
            break
        chosen.add(replica_of(client, f"{how}-{session}"))
    assert len(chosen) == 2


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI) -> None:
    streams = [
        ask(client, f"Go on {n}", stream=True, max_tokens=3000, extra_body={"ignore_eos": True}) for n in range(8)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    with ThreadPoolExecutor(8) as callers:  # as many as run at once
        replies = list(callers.map(lambda n: ask(client, f"Number {n}", timeout=60), range(8)))
    assert all(reply.choices[0].finish_reason for reply in replies)


def test_a_replica_is_killed_under_load(client: openai.OpenAI) -> None:
    """A request that has got nothing yet is answered by another replica; a stream that had begun ends with an error."""
    import ray

    long: dict[str, Any] = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}, "timeout": 120}
    here = {"extra_headers": {"x-session-id": "killed"}}  # all on one replica
    killed = replica_of(client, "killed")
    begun = threading.Semaphore(0)

    def stream(number: int) -> tuple[int, str | None]:
        events = 0
        try:
            for _ in ask(client, f"Stream {number}", stream=True, **long, **here):
                events += 1
                begun.release()
        except openai.APIError as error:
            return events, error.code
        return events, None

    def whole(number: int, where: dict[str, Any]) -> str:
        return str(ask(client, f"Whole {number}", **long, **where).choices[0].finish_reason)

    with ThreadPoolExecutor(16) as callers:
        wholes = [callers.submit(whole, number, here) for number in range(2)]
        while running(client, "killed") < 2:
            assert not any(reply.done() for reply in wholes)
        broken = callers.submit(stream, 0)
        assert begun.acquire(timeout=60)
        wholes += [callers.submit(whole, number, {}) for number in range(2, 10)]
        ray.kill(ray.get_actor(f"SERVE_REPLICA::{NAME}#Model#{killed}", namespace="serve"))
        assert [reply.result(timeout=120) for reply in wholes] == ["length"] * 10
        events, code = broken.result(timeout=120)
    assert events
    assert code == "replica_died"
    assert replica_of(client, "killed") != killed


def test_an_application_that_is_deleted_lets_its_replies_end(client: openai.OpenAI) -> None:
    """The last test of this file."""
    from ray import serve

    events = iter(ask(client, "Hi", stream=True, max_tokens=1500, extra_body={"ignore_eos": True}))
    next(events)
    with ThreadPoolExecutor(1) as background:
        deleted = background.submit(serve.delete, NAME)
        assert [event.choices[0].finish_reason for event in events][-1] == "length"
        deleted.result(timeout=60)
    with pytest.raises(openai.APIStatusError):
        ask(client, "Hi")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"replicas": 0}, "replicas=0"),
        ({"replicas": (3, 2)}, "3, 2"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": 2, "backend": "llm_pipeline"}, "concurrency=2 does not work with backend='llm_pipeline'"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], match: str) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    from ov_phi3.serving.ray import deployment

    with pytest.raises(ov_phi3.ConfigError, match=match):
        deployment("model", **options)
