"""A process that loads and closes models again and again does not grow, and `close` frees the model."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import ov_phi3

SCRIPT = """
import gc, os, sys
import ov_phi3
from ov_phi3.system.core import give_memory_back

def cycle():
    pipe = ov_phi3.load(sys.argv[1], "CPU", backend=sys.argv[2], ov_config=eval(sys.argv[3]))
    pipe.generate("Hello", max_new_tokens=4)
    pipe.close()

def anonymous_mib_and_threads():
    gc.collect()
    give_memory_back()
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))
    return kib / 1024, len(os.listdir("/proc/self/task"))

for _ in range(2):
    cycle()
seen = []
for _ in range(3):
    cycle()
    seen.append(anonymous_mib_and_threads())
before, threads_before = (min(values) for values in zip(*seen))
for further in range(60):
    cycle()
    mib, threads = anonymous_mib_and_threads()
    if further >= 6 and mib < before + float(sys.argv[4]):
        break
print(mib - before, threads - threads_before)
"""
"""At least seven cycles lie between the two figures, and as many more as it takes until a cycle leaves what the early
ones left."""

ROOM_MIB = 10
"""What a later cycle may leave more than the early ones. A model that was closed sometimes leaves a buffer or two as
large as its widest weights (27 and 38 MiB with the demo model, on a busy machine more often); a later cycle frees them,
so one that is back at the early figure is waited for. The fault that this test guards against left 7 MiB a cycle and
never came back."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("backend", "config"), [("infer_request", {}), ("llm_pipeline", {"ATTENTION_BACKEND": "SDPA"})]
)
def test_loading_again_and_again_keeps_memory_and_threads(
    demo_int4: Path, backend: str, config: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, demo_int4, backend, repr(config), str(ROOM_MIB)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, threads = map(float, done.stdout.split())
    assert threads <= 0
    assert grown < ROOM_MIB


def test_close_lets_go_of_the_compiled_model(tiny_fp32: Path) -> None:
    def models() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "CompiledModel" for thing in gc.get_objects())

    before = models()
    pipe = ov_phi3.load(tiny_fp32, device="CPU", backend="infer_request")
    pipe.generate("hi", max_new_tokens=2)
    assert models() > before
    pipe.close()
    assert models() == before
