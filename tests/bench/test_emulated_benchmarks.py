"""`latency.py` on the emulated GPU.0: it runs to its end, and its JSON and its text name the emulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulated

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "latency.py"
# The settings of the other emulated tests, whose kernels are built already.
EXACT = ("INFERENCE_PRECISION_HINT=f32", "KV_CACHE_PRECISION=f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE=0")


def test_latency_runs_to_its_end_on_the_emulated_gpu(tiny_fp32: Path, tmp_path: Path) -> None:
    if not os.environ.get("OV_PHI3_EMULATED_GPUS"):
        pytest.skip("needs the emulated GPU: python scripts/test.py --stage emulated")
    sizes = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1", "--chat-turns", "2"]
    settings = [argument for pair in EXACT for argument in ("--ov-config", pair)]
    target, plots = tmp_path / "latency.json", tmp_path / "plots"
    command = [sys.executable, SCRIPT, tiny_fp32, "--device", "GPU.0", *sizes, *settings, "--against"]
    done = subprocess.run([*command, "--json", target, "--plot", plots], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(emulated)" in next(line for line in done.stdout.splitlines() if line.startswith("device "))
    report = json.loads(target.read_text(encoding="utf-8"))
    assert "(emulated)" in report["device"]["full_name"]
    assert [turn["prefilled_tokens"] is not None for turn in report["chat"]] == [True, True]
    assert sorted(path.name for path in plots.iterdir()) == ["chat.png", "inter-token.png", "latency.png"]
