"""Tests in processes of their own, where an abort, a hang or a network request is seen: there is none."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from processes import run

from ov_phi3 import Pipeline

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True, "do_sample": False}


QUIET = """
import sys
import ov_phi3

for backend in ("infer_request", "llm_pipeline"):
    with ov_phi3.load(sys.argv[1], device=sys.argv[2], backend=backend) as pipe:
        pipe.generate([5, 6], max_new_tokens=1)
ov_phi3.GenerationConfig(max_new_tokens=1).to_genai()
print("openvino_telemetry" in sys.modules)
import openvino_telemetry
print("openvino_telemetry" in sys.modules)
"""


def test_openvino_sends_no_telemetry(tiny_fp32: Path, device: str) -> None:
    done = run(QUIET, tiny_fp32, device)
    assert done.stdout.split() == ["False", "True"], done.stderr


AT_ONCE = """
import sys, threading
from ov_phi3 import Tokenizer

barrier = threading.Barrier(4)

def opened():
    barrier.wait()
    Tokenizer(sys.argv[1]).encode("Hi")

threads = [threading.Thread(target=opened) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("all")
"""


def test_tokenizers_opened_at_once_do_not_wait_for_each_other(tiny_fp32: Path) -> None:
    for _ in range(3):
        assert run(AT_ONCE, tiny_fp32).stdout == "all\n"


DAMAGED = """
import sys
import ov_phi3

try:
    ov_phi3.load(sys.argv[1], device=sys.argv[2], backend=sys.argv[3])
except ov_phi3.ModelError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
@pytest.mark.parametrize("name", ["openvino_tokenizer.bin", "openvino_detokenizer.bin"])
def test_a_tokenizer_that_points_outside_itself(
    tiny_fp32: Path, device: str, tmp_path: Path, backend: str, name: str
) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(tiny_fp32, damaged)
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:1000] + b"\xff\xff\xff\x7f" * 100 + data[1400:])
    done = run(DAMAGED, damaged, device, backend)
    assert done.returncode == 0, done.stderr  # and not a signal
    assert "is damaged: a string table points outside" in done.stdout


@pytest.mark.parametrize("pipes", ["tiny_pipe", "tiny_loop", "tiny_batch"])
class TestManyAtOnce:
    """8 threads and 50 tasks with 20 requests each: every reply equals that of a request without others."""

    PROMPTS = tuple([300 + 7 * number, 400, 500 + number, 600] for number in range(12))

    def test_threads(self, pipes: str, request: pytest.FixtureRequest) -> None:
        pipe: Pipeline = request.getfixturevalue(pipes)
        alone = [self.ask(pipe, prompt) for prompt in self.PROMPTS]
        replies: dict[tuple[int, int], list[int]] = {}

        def work(worker: int) -> None:
            for number in range(20):
                replies[worker, number] = self.ask(pipe, self.PROMPTS[(worker + number) % 12])

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert replies == {(w, n): alone[(w + n) % 12] for w in range(8) for n in range(20)}

    async def test_tasks(self, pipes: str, request: pytest.FixtureRequest) -> None:
        pipe: Pipeline = request.getfixturevalue(pipes)
        alone = [self.ask(pipe, prompt) for prompt in self.PROMPTS]

        async def work(worker: int) -> list[list[int]]:
            return [
                (await pipe.stream(self.PROMPTS[(worker + n) % 12], **OPTIONS).aresult()).token_ids for n in range(20)
            ]

        replies = await asyncio.gather(*(work(worker) for worker in range(50)))
        assert replies == [[alone[(worker + n) % 12] for n in range(20)] for worker in range(50)]

    def ask(self, pipe: Pipeline, prompt: list[int]) -> list[int]:
        return pipe.generate(prompt, **OPTIONS).token_ids


CANCELLED = """
import contextlib, random, sys
import ov_phi3
from ov_phi3.backends.paged.model_runner import ModelRunner
from ov_phi3.backends.protocol import Cancelled

wait_ms = None


def infer_while(runner, should_continue):
    global wait_ms
    after, wait_ms = wait_ms, None  # the second attempt of a cancelled pass is not cancelled
    request = runner._request
    if after is None:
        request.infer()
        return
    request.start_async()
    if not request.wait_for(after):
        request.cancel()
        with contextlib.suppress(RuntimeError):
            request.wait()
        raise Cancelled


ModelRunner._infer_while = infer_while
options = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 3, "seed": 1}
with ov_phi3.load(sys.argv[1], device=sys.argv[2], backend="infer_request", context_length=512) as pipe:
    prompts = {length: list(range(1000, 1000 + length)) for length in (24, 78)}
    known = {length: pipe.generate(ids, **options).token_ids for length, ids in prompts.items()}
    for seed in range(3):
        draw = random.Random(seed)
        for _ in range(60):
            wait_ms = draw.choice([None, 0, 2, 5, 8, 12, 20])
            length = draw.choice([24, 78])
            replies = pipe.generate(prompts[length], **options).token_ids
            assert replies in ([], known[length]), (length, wait_ms, replies, known[length])
print("all right")
"""


def test_cancelled_passes_leave_the_engine_right(demo_int4: Path, device: str) -> None:
    # Without `_repair`, which runs another pass after each, the next pass fails or kills the process.
    done = run(CANCELLED, demo_int4, device)
    assert (done.returncode, done.stdout) == (0, "all right\n"), done.stderr
