"""The programs of the recipes page, run as a reader would."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from pages import DOCS, ROOT, python_blocks

EXAMPLES = ROOT / "docs" / "examples"


def test_the_page_shows_the_files() -> None:
    shown = {
        match[1]: block.text
        for block in python_blocks(DOCS / "recipes.md")
        if (match := re.match(r"it is docs/examples/(\w+\.py)", block.not_run or ""))
    }
    assert set(shown) == {path.name for path in EXAMPLES.glob("*.py")} - {"ask.py"}
    for name, text in shown.items():
        assert text == (EXAMPLES / name).read_text(encoding="utf-8"), name


def test_the_worker_replies_from_a_process_of_its_own(demo_int4: Path) -> None:
    command = [sys.executable, EXAMPLES / "worker.py", demo_int4]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    france, japan = done.stdout.splitlines()[:2]
    assert "Paris" in france
    assert "Tokyo" in japan


@pytest.fixture
def web(demo_int4: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setenv("MODEL", str(demo_int4))
    spec = importlib.util.spec_from_file_location("web", EXAMPLES / "web.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "web", module)  # where FastAPI looks the types up
    spec.loader.exec_module(module)
    return module


async def test_the_web_endpoint_streams_and_refuses(web: types.ModuleType) -> None:
    import httpx

    transport = httpx.ASGITransport(web.app)
    async with (
        web.app.router.lifespan_context(web.app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        reply = await client.post("/ask", json={"text": "What is the capital of France?", "max_new_tokens": 32})
        assert reply.status_code == 200
        assert "Paris" in reply.text
        wrong = await client.post("/ask", json={"text": "Hi", "max_new_tokens": 0})
        assert wrong.status_code == 422
        assert "max_new_tokens=0" in wrong.json()["detail"]
        assert (await client.post("/ask", json={})).status_code == 422
