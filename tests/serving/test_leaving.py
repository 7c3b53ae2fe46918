"""Clients that leave in the middle of their replies: the others get theirs, and the engine gets its blocks back."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from paged import blocks_of

import ov_phi3
from ov_phi3.serving import create_app

HEADERS = {"content-type": "application/json", "connection": "close"}
OPTIONS = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def pipe(tiny_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    with ov_phi3.load(tiny_fp32, device=device, concurrency=8) as loaded:
        yield loaded


@pytest.fixture
def address(pipe: ov_phi3.Pipeline) -> Iterator[str]:
    """A server in a thread of this process, so that the test sees its engine."""
    config = uvicorn.Config(create_app(pipe, max_queue=64), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def others() -> list[str]:
    """Threads, without the few of the server's pool, which stay."""
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("ov_phi3-serve"))


def open_reply(address: str, content: str, **options: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address)
    body = {"model": "phi-3", "messages": [{"role": "user", "content": content}], **OPTIONS, **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), HEADERS)
    return connection.getresponse()


def test_fifty_clients_of_whom_a_third_leave_in_the_middle(pipe: ov_phi3.Pipeline, address: str) -> None:
    stayers = [n for n in range(50) if n % 3]
    expected = {
        n: pipe.generate(f"Number {n}.", max_new_tokens=24, temperature=0, ignore_eos=True).text for n in stayers
    }
    open_reply(address, "Hi").read()
    blocks = blocks_of(pipe)
    assert blocks.num_available == blocks.num_blocks
    before = others()

    def client(n: int) -> str | None:
        streamed = n % 2 == 0
        if n % 3 == 0:  # the reply would take minutes: it ends because nobody reads it
            with open_reply(address, f"Leave {n}.", max_tokens=3900, stream=True) as response:
                for _ in range(3 + n % 7):
                    response.readline()
                response.close()
            return None
        with open_reply(address, f"Number {n}.", stream=streamed) as response:
            content = response.read().decode()
        assert response.status == 200, content
        if not streamed:
            return str(json.loads(content)["choices"][0]["message"]["content"])
        events = [json.loads(line[6:]) for line in content.splitlines() if line.startswith("data: {")]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    with ThreadPoolExecutor(50) as clients:
        answers = dict(enumerate(clients.map(client, range(50))))
    assert {n: answers[n] for n in stayers} == expected
    blocks = blocks_of(pipe)  # waits for the engine's thread, and checks that no sequence holds a block
    assert blocks.num_available == blocks.num_blocks
    for thread in threading.enumerate():
        if thread.name == "ov_phi3-stream":
            thread.join()
    assert others() == before
    ready = http.client.HTTPConnection(address)
    ready.request("GET", "/ready")
    assert json.loads(ready.getresponse().read()) == {"status": "ready", "running": 0, "waiting": 0}
    ready.close()
