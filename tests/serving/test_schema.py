"""The server against its own OpenAPI schema: whatever a request holds, the answer is no fault of the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="needs Python 3.11 or later")

HEADERS = {"authorization": "Bearer a-key-for-the-tests"}
REPLIES = ("/v1/chat/completions", "/v1/completions")
KNOWN = (
    "model", "messages", "prompt", "n", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed",
    "stop", "presence_penalty", "frequency_penalty", "session_id", "logprobs", "echo",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def schema(serve: Any, tiny_fp32: Path) -> Iterator[Any]:
    """The schema of a server whose replies are short."""
    with serve(tiny_fp32, "--concurrency", "8", "--max-queue", "32", "--max-tokens", "3") as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)


def try_all(operations: Any, send: Callable[[Any], None]) -> list[str]:
    """Send requests that schemathesis makes of operations; returns the operations."""
    tried = []
    for found in operations.get_all_operations():
        operation = found.ok()

        @settings(max_examples=60, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            send(case)

        run()
        tried.append(operation.label)
    return tried


def status_of(case: Any) -> int:
    """The status of the answer, which has OpenAI's shape if it is an error."""
    response = case.call(headers=HEADERS)
    status = int(response.status_code)
    assert status < 500, f"{case.as_curl_command()}\n{response.text}"
    if status >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return status


def test_any_request(schema: Any) -> None:
    tried = try_all(schema, status_of)
    assert {f"POST {path}" for path in REPLIES} < set(tried)


def test_requests_that_can_be_answered(schema: Any) -> None:
    """The model's name and the prompt are right, so that the rest of the request gets as far as a reply."""
    statuses: Counter[tuple[str, int]] = Counter()

    def send(case: Any) -> None:
        body = {name: value for name, value in case.body.items() if name in KNOWN}  # others are refused as unknown
        asks = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in case.path else {"prompt": ["Hi", "a"]}
        case.body = {**body, "model": "phi-3", **asks}
        statuses[case.path, status_of(case)] += 1

    try_all(schema.include(path=list(REPLIES)), send)
    assert all(statuses[path, 200] > 5 for path in REPLIES), statuses
