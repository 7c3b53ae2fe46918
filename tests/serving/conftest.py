"""A real `ov-phi3 serve` process, and clients for it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KEY = "a-key-for-the-tests"


class Server:
    """A running server: its address, its process, and what it has written."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            pytest.fail("".join(self.lines))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def wait(self) -> int:
        """Wait until it has ended; its exit code."""
        code = self.process.wait(timeout=120)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """Starts servers: `with serve(model_dir, "--flag", ...) as server`."""

    @contextlib.contextmanager
    def start(model_dir: Path, *flags: str, key: str = KEY) -> Iterator[Server]:
        device = os.environ.get("OV_PHI3_TEST_DEVICE") or "CPU"
        command = [sys.executable, "-m", "ov_phi3", "serve", str(model_dir), "--port", "0", "--device", device, *flags]
        environment = {**os.environ, "OV_PHI3_API_KEY": key}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            server = Server(process)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
            server.wait()

    return start


@pytest.fixture(scope="session")
def server(serve: Callable[..., Any], demo_fp32: Path) -> Iterator[Server]:
    """The demo model in float32, shared by all tests."""
    with serve(demo_fp32, "--concurrency", "8", "--max-queue", "64", "--max-body-mb", "0.1") as running:
        yield running


@pytest.fixture(scope="session")
def openai_client(server: Server) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client
