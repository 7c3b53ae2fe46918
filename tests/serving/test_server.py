"""The server under load and at its end: clients that leave, a full queue, the key, limits, and a clean shutdown."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import ov_phi3
from ov_phi3.serving.sessions import Sessions

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="counts threads in /proc")
KEY = "a-key-for-the-tests"
LONG = {"max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def request(
    server: Any, method: str, path: str, body: Any = None, *, key: str = KEY, **headers: str
) -> tuple[int, Any, Any]:
    """Status, headers, and the body, from JSON if it is."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    lines = {"authorization": f"Bearer {key}", "content-type": "application/json", **headers}
    try:
        connection.request(method, path, data, lines)
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, response.headers, json.loads(content) if is_json else content.decode()
    finally:
        connection.close()


def chat(content: str, **options: Any) -> dict[str, Any]:
    return {"model": "phi-3", "messages": [{"role": "user", "content": content}], "temperature": 0, **options}


def state(server: Any) -> tuple[int, int]:
    """Replies that run and that wait."""
    counts = request(server, "GET", "/ready")[2]
    return counts["running"], counts["waiting"]


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.02)
    pytest.fail("it never became true")


def threads_of(server: Any) -> list[str]:
    folder = Path(f"/proc/{server.process.pid}/task")
    return sorted((task / "comm").read_text().strip() for task in folder.iterdir())


class Leaver:
    """A client that reads the first bytes of a reply, or none, and goes away."""

    def __init__(self, server: Any, body: dict[str, Any], *, reads: bool) -> None:
        address = urlsplit(server.url)
        self.socket = socket.create_connection((address.hostname, address.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)
        if reads:
            self.socket.recv(64)

    def leave(self) -> None:
        self.socket.close()


def test_fifty_clients_of_whom_a_third_leave(server: Any, loop: ov_phi3.Pipeline) -> None:
    questions = [f"Tell me about number {n}." for n in range(34)]
    expected = [loop.generate(question, max_new_tokens=6, temperature=0).text for question in questions]
    assert request(server, "POST", "/v1/chat/completions", chat("Hi", max_tokens=2))[0] == 200
    until(lambda: state(server) == (0, 0))

    def ask(at: int) -> str:
        body = chat(questions[at], max_tokens=6, stream=at % 2 == 0)
        status, _, content = request(server, "POST", "/v1/chat/completions", body)
        assert status == 200, content
        if at % 2:
            return str(content["choices"][0]["message"]["content"])
        events = [json.loads(line[6:]) for line in content.splitlines() if line.startswith("data: {")]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    def rush(clients: int) -> list[str]:
        with ThreadPoolExecutor(clients) as callers:
            answers = [callers.submit(ask, at) for at in range(clients)]
            leavers = [
                Leaver(server, chat(f"Go {n}", stream=n % 2 == 0, **LONG), reads=n in (0, 2, 4))
                for n in range(clients // 2)
            ]
            for leaver in leavers:
                leaver.leave()
            return [answer.result() for answer in answers]

    assert rush(6) == expected[:6]
    until(lambda: state(server) == (0, 0))
    before = threads_of(server)
    assert rush(34) == expected
    until(lambda: state(server) == (0, 0))
    until(lambda: len(threads_of(server)) <= len(before))
    assert (
        request(server, "POST", "/v1/chat/completions", chat(questions[1], max_tokens=6))[2]["choices"][0]["message"][
            "content"
        ]
        == expected[1]
    )


def test_a_full_queue_is_refused_and_frees_itself(serve: Any, tiny_fp32: Path) -> None:
    with serve(tiny_fp32, "--concurrency", "1", "--max-queue", "1") as server:
        running = [
            Leaver(server, chat("Hi", stream=True, **{**LONG, "max_tokens": 2000}), reads=False) for _ in range(2)
        ]
        until(lambda: state(server) == (1, 1))
        assert request(server, "GET", "/ready")[0] == 503
        status, headers, body = request(server, "POST", "/v1/chat/completions", chat("Hi", max_tokens=1))
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert request(server, "GET", "/health", key="")[0] == 200
        for client in running:
            client.leave()
        until(lambda: state(server) == (0, 0))
        assert request(server, "POST", "/v1/chat/completions", chat("Hi", max_tokens=1))[0] == 200


def test_llm_pipeline_answers_one_request_after_another(serve: Any, tiny_fp32: Path) -> None:
    with serve(tiny_fp32, "--backend", "llm_pipeline") as server:
        running = [Leaver(server, chat("Hi", stream=True, **LONG), reads=False) for _ in range(2)]
        until(lambda: state(server) == (1, 1))
        for client in running:
            client.leave()
        until(lambda: state(server) == (0, 0))
        assert request(server, "POST", "/v1/chat/completions", chat("Hi", max_tokens=1))[0] == 200


@pytest.mark.parametrize(("drain", "tokens"), [("60", 30), ("1", 3000)])
def test_sigterm_lets_replies_end_or_ends_them(
    serve: Any, tiny_fp32: Path, demo_int4: Path, drain: str, tokens: int
) -> None:
    # The tiny model may generate 3,000 tokens in the second that they have, the demo model cannot.
    with serve(tiny_fp32 if tokens == 30 else demo_int4, "--drain", drain) as server:
        body = chat("Hi", stream=True, **{**LONG, "max_tokens": tokens})
        client = Leaver(server, body, reads=True)
        server.process.send_signal(signal.SIGTERM)
        content = b""
        while part := client.socket.recv(65536):
            content += part
        client.leave()
        assert server.wait() == 0, "".join(server.lines)
    assert (b"[DONE]" in content) == (tokens == 30)


def test_sessions_are_few_and_small(tiny_batch: ov_phi3.Pipeline) -> None:
    ids = {name: tiny_batch.encode(f"A conversation about {name}.") for name in ("a", "b", "c")}
    size = tiny_batch.prefill(ids["a"].tolist()).nbytes
    for most, most_bytes, kept in ((2, 10 * size, 2), (5, 2 * size, 2), (5, size - 1, 0), (0, size, 0)):
        sessions = Sessions(tiny_batch, most, most_bytes)
        for name in ("a", "b", "c", "c"):
            sessions.keep(name, ids[name].tolist())
        assert len(sessions) == kept
        assert sessions.nbytes == kept * size


def test_sessions_metrics_and_tokens(server: Any, loop: ov_phi3.Pipeline) -> None:
    def reused(messages: list[dict[str, str]]) -> tuple[int, str]:
        body = {"model": "phi-3", "messages": messages, "max_tokens": 6, "temperature": 0, "session_id": "s"}
        answer = request(server, "POST", "/v1/chat/completions", body)[2]
        details = answer["usage"]["prompt_tokens_details"]
        return details["cached_tokens"], answer["choices"][0]["message"]["content"]

    messages = [{"role": "user", "content": "Tell me about the town of Quadragint."}]
    _, text = reused(messages)
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "More."}]
    assert reused(messages)[0] >= loop.count_tokens(messages[:1])
    status, headers, content = request(server, "GET", "/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    values = dict(re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", content, re.MULTILINE))
    assert float(values["ov_phi3_cached_tokens_total"]) > 0
    assert values['ov_phi3_ttft_seconds_bucket{le="+Inf"}'] == values["ov_phi3_ttft_seconds_count"]
    tokens = request(server, "POST", "/tokenize", {"messages": messages})[2]
    assert tokens["tokens"] == loop.encode(messages).tolist()
    assert request(server, "POST", "/tokenize", {"prompt": "a"})[2]["count"] == 1
    assert request(server, "POST", "/tokenize", {})[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[" * 50_000, 400),
        ("POST", "/v1/chat/completions", b"\xff", 400),
        ("POST", "/v1/chat/completions", b'{"model":"phi-3","messages":[{"role":"user","content":"\\ud800"}]}', 400),
        ("POST", "/v1/chat/completions", b'{"model":"\\ud800","messages":[{"role":"user","content":"a"}]}', 404),
        ("POST", "/v1/completions", b'{"model":"phi-3","prompt":[1e999]}', 400),
        ("POST", "/v1/completions", b'{"model":"phi-3","prompt":[[-1]]}', 400),
        ("POST", "/v1/completions", b'{"model":"phi-3","prompt":[]}', 400),
        ("POST", "/v1/completions", b'{"model":"phi-3","prompt":"a","temperature":NaN}', 400),
        ("POST", "/v1/completions", b'{"model":"phi-3","prompt":"a","\\ud800":1}', 400),
        ("POST", "/v1/chat/completions", b"x" * 200_000, 413),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/nosuch", None, 404),
    ],
)
def test_what_cannot_be_read_is_refused_in_openais_shape(
    server: Any, method: str, path: str, body: bytes | None, status: int
) -> None:
    got, _, content = request(server, method, path, body)
    assert (got, set(content["error"])) == (status, {"message", "type", "param", "code"})


def test_pages_of_other_origins_cannot_read_answers(server: Any) -> None:
    _, headers, _ = request(server, "GET", "/v1/models", origin="http://elsewhere.example")
    assert "access-control-allow-origin" not in headers
    assert request(server, "GET", "/v1/models", key="wrong")[0] == 401
    assert request(server, "GET", "/docs")[0] == 404
