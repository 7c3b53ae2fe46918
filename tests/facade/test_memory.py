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

def least(cycles):
    seen = []
    for _ in range(cycles):
        cycle()
        seen.append(anonymous_mib_and_threads())
    return [min(values) for values in zip(*seen)]

for _ in range(2):
    cycle()
before = least(3)
for _ in range(6):
    cycle()
after = least(3)
print(after[0] - before[0], after[1] - before[1])
"""
"""Nine cycles lie between the two figures."""

ONE_BUFFER_MIB = 30
"""The last model may leave one buffer as large as the widest weights (27 MiB with the demo model), on a busy machine
more often, before the first figure or after it. It does not add up. The fault that this test guards against left 7 MiB
a cycle."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("backend", "config"), [("infer_request", {}), ("llm_pipeline", {"ATTENTION_BACKEND": "SDPA"})]
)
def test_loading_again_and_again_keeps_memory_and_threads(
    demo_int4: Path, backend: str, config: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, demo_int4, backend, repr(config)], capture_output=True, text=True, check=True
    )
    grown, threads = map(float, done.stdout.split())
    assert threads <= 0
    assert grown < ONE_BUFFER_MIB + 10


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
