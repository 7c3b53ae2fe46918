"""The server under Ray Serve: OpenAI's client, sessions that stay with their replica, a replica killed under load."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
        pytest.skip("kills a process with SIGKILL")
    from ray import serve

    from ov_phi3.serving.ray import deployment

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = deployment(tiny_fp32, replicas=2, concurrency=4, api_key=KEY, device=device, drain=5)
        serve.run(app, name=NAME)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client: openai.OpenAI, content: str, **options: Any) -> Any:
    options = {"max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": content}], **options}
    return client.chat.completions.create(model="phi-3", **options)


def replicas() -> list[int]:
    """The processes of the replicas."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (folder / "cmdline").exists():
            with (folder / "cmdline").open("rb") as file:
                if file.read().startswith(f"ray::ServeReplica:{NAME}:Model".encode()):
                    found.append(int(folder.name))
    return found


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
    for session in range(4):
        name = f"{how}-{session}"
        where: dict[str, Any] = {"extra_headers": {"x-session-id": name}}
        if how == "body":
            where = {"extra_body": {"session_id": name}}
        messages = [{"role": "user", "content": f"Session {name}. " + "Tell me more. " * 20}]
        seen = 0
        for _ in range(3):
            reply = ask(client, "", messages=messages, **where)
            assert reply.usage.prompt_tokens_details.cached_tokens >= seen
            seen = reply.usage.prompt_tokens - 1
            messages += [
                {"role": "assistant", "content": reply.choices[0].message.content},
                {"role": "user", "content": "And then?"},
            ]


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
    """Whoever has got nothing yet gets the whole reply, from another replica; a stream that had begun ends."""
    before = replicas()
    assert len(before) == 2
    long: dict[str, Any] = {"max_tokens": 600, "extra_body": {"ignore_eos": True}, "timeout": 120}
    begun = threading.Semaphore(0)

    def stream(number: int) -> tuple[str, int]:
        events = 0
        try:
            for event in ask(client, f"Stream {number}", stream=True, **long):
                events += 1
                reason = event.choices[0].finish_reason
                if events == 1:
                    begun.release()
            return reason, events
        except openai.APIError as error:
            return str(error.code), events

    def whole(number: int) -> str:
        return str(ask(client, f"Whole {number}", **long).choices[0].finish_reason)

    with ThreadPoolExecutor(24) as callers:
        streams = [callers.submit(stream, number) for number in range(8)]
        for _ in range(6):  # on both replicas: one has four at most
            assert begun.acquire(timeout=60)
        wholes = [callers.submit(whole, number) for number in range(16)]
        os.kill(before[0], signal.SIGKILL)
        assert [reply.result(timeout=120) for reply in wholes] == ["length"] * 16
        ends = [reply.result(timeout=120) for reply in streams]
    assert {reason for reason, _ in ends} == {"length", "replica_died"}
    assert all(events for _, events in ends)
    assert ask(client, "Hi").choices[0].message.content
