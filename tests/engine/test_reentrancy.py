"""Calls from inside a callback of a running request: a StreamError instead of a wait that never ends.

The programs run in separate processes: a call that waits for itself would hang the whole test run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run

PROGRAM = """
import sys, threading
import ov_phi3

model, device, backend, where = sys.argv[1:]
own = backend == "infer_request"
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "ignore_eos": True}
pipe = ov_phi3.load(model, device=device, backend=backend, context_length=256)
expected = pipe.generate([5, 6, 7], **OPTIONS).token_ids
chat = pipe.chat()
chat.send("Hi", **OPTIONS)
streams = []
known = threading.Event()

def own_stream():
    assert known.wait(60)
    return streams[-1]

CALLS = {
    "close": lambda: pipe.close(),
    "generate": lambda: pipe.generate("Hi", **OPTIONS),
    "stream": lambda: pipe.stream("Hi", **OPTIONS),
    "send": lambda: chat.send("Hi", **OPTIONS),
    "own result": lambda: own_stream().result,
    "own chunks": lambda: list(own_stream()),
    "leave own stream": lambda: own_stream().__exit__(None, None, None),
    "warmup": lambda: pipe.warmup(),
}
if own:
    CALLS["prefill"] = lambda: pipe.prefill("Hi")
    CALLS["score"] = lambda: pipe.score("Hi", "there")
    CALLS["save"] = lambda: chat.save("never.kv")


def attempt(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "no error"


def inside(call, prompt):
    \"\"\"What a call gives from inside the callback of a reply.\"\"\"
    outcomes = []

    def callback(*arguments):
        if not outcomes:
            outcomes.append(attempt(call))
        return arguments[-1]  # the logits of a processor

    option = {"on_prefill": callback} if where == "on_prefill" else {"logits_processors": [callback]}
    known.clear()
    streams.append(pipe.stream(prompt, **option, **OPTIONS))
    known.set()
    ended = streams[-1].result.finish_reason
    return outcomes[0], ended in ("length", "cancelled")


for number, (name, call) in enumerate(CALLS.items()):
    print(name, *inside(call, [300 + number, 5, 6]))
    assert pipe.generate([5, 6, 7], **OPTIONS).token_ids == expected, name
print("usable", chat.send("And now?", **OPTIONS).finish_reason)
pipe.close()
print("closed")
"""

NAMES = ["close", "generate", "stream", "send", "own result", "own chunks", "leave own stream", "warmup"]
KV_NAMES = ["prefill", "score", "save"]


@pytest.mark.parametrize(
    ("backend", "where"),
    [("llm_pipeline", "on_prefill"), ("infer_request", "on_prefill"), ("infer_request", "processor")],
)
def test_a_call_from_inside_a_callback(tiny_fp32: Path, device: str, backend: str, where: str) -> None:
    done = run(PROGRAM, tiny_fp32, device, backend, where)
    names = NAMES + (KV_NAMES if backend == "infer_request" else [])
    expected = [f"{name} StreamError True" for name in names]
    assert done.stdout.splitlines() == [*expected, "usable length", "closed"], done.stderr
    assert done.returncode == 0


IN_PREFILL = """
import sys
import ov_phi3

pipe = ov_phi3.load(sys.argv[1], device=sys.argv[2], backend="infer_request", context_length=256)
for name, call in {
    "close": lambda: pipe.close(),
    "generate": lambda: pipe.generate([5], max_new_tokens=1),
    "prefill": lambda: pipe.prefill([5]),
}.items():
    outcomes = []

    def callback(done, total):
        try:
            call()
        except ov_phi3.StreamError:
            outcomes.append("StreamError")
        else:
            outcomes.append("no error")

    prefix = pipe.prefill(list(range(300, 340)), on_prefill=callback)
    print(name, set(outcomes), len(prefix))
print(len(pipe.generate([5], max_new_tokens=2, ignore_eos=True).token_ids))
pipe.close()
"""


def test_a_call_from_inside_a_callback_of_prefill(tiny_fp32: Path, device: str) -> None:
    done = run(IN_PREFILL, tiny_fp32, device)
    names = ("close", "generate", "prefill")
    assert done.stdout.splitlines() == [*(f"{name} {{'StreamError'}} 40" for name in names), "2"], done.stderr
