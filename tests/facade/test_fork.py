"""A forked process cannot use what its parent loaded, is told so, and ends; the parent goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

PROGRAM = """
import os, signal, sys
import ov_phi3

pipe = ov_phi3.load(sys.argv[1], device=sys.argv[2], backend=sys.argv[3])
wanted = pipe.generate("Hi", max_new_tokens=3).token_ids
chat = pipe.chat()
chat.send("Hi", max_new_tokens=2)
running = pipe.stream("Tell me about the sea.", ignore_eos=True)
reading = iter(running)
next(reading)
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends what hangs, with another exit code
    said = []
    for use in (
        lambda: pipe.generate("Hi"),
        lambda: chat.send("Hi"),
        lambda: chat.save("x.kv"),
        lambda: pipe.tokenizer.encode("Hi"),
        lambda: running.result,
        lambda: next(reading),
    ):
        try:
            use()
        except ov_phi3.ClosedError as error:
            said.append("is a fork of it" in str(error))
    print(said, flush=True)
    if sys.argv[4] == "close":
        pipe.close()
    elif sys.argv[4] == "delete":
        del pipe, chat, running, reading
    sys.exit(7)
ended = os.waitpid(child, 0)[1]
running.cancel()
print(os.waitstatus_to_exitcode(ended), pipe.generate("Hi", max_new_tokens=3).token_ids == wanted)
"""


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
@pytest.mark.parametrize("how", ["exit", "close", "delete"])
def test_a_fork(demo_int4: Path, device: str, backend: str, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(demo_int4), device, backend, how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.splitlines() == [str([True] * 6), "7 True"], done.stderr
    assert done.stderr == ""


POOL = """
import multiprocessing, sys
import ov_phi3

def ask(question):
    with ov_phi3.load(sys.argv[1], device=sys.argv[2]) as pipe:
        return pipe.generate(question, max_new_tokens=8).text

if __name__ == "__main__":
    with ov_phi3.load(sys.argv[1], device=sys.argv[2]) as pipe:
        here = pipe.generate("What is the capital of France?", max_new_tokens=8).text
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(ask, ["What is the capital of France?"]) == [here])
"""


def test_multiprocessing_with_spawn(demo_int4: Path, device: str, tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "pool.py"), str(demo_int4), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.stdout, done.stderr) == ("True\n", "")
