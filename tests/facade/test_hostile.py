"""The library attacked from outside, in processes of its own, so that an abort is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HOSTILE = Path(__file__).parents[1] / "support" / "hostile.py"
CASES = os.environ.get("OV_PHI3_HOSTILE_CASES") or "10000"


def test_ten_thousand_cases(tiny_fp32: Path, device: str) -> None:
    command = [sys.executable, "-W", "ignore", str(HOSTILE), str(tiny_fp32), "--device", device, "--cases", CASES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "0 faults" in done.stdout


def test_a_fault_is_found(tiny_fp32: Path, device: str) -> None:
    """The attack sees a library that lets user text make control tokens, and one that reads what is damaged."""
    broken = (
        "import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(1))\n"
        "import hostile, ov_phi3\n"
        "from ov_phi3.kv import snapshot\n"
        "from ov_phi3.text import tokenizer\n"
        "tokenizer.Tokenizer._is_unsafe = lambda self, text, ids: False\n"
        "snapshot._check_sums = lambda *a, **b: None\n"
        "sys.exit(hostile.main())"
    )
    command = [sys.executable, "-W", "ignore", "-c", broken, "hostile.py", str(HOSTILE.parent), str(tiny_fp32)]
    options = ["--device", device, "--cases", "1500", "--only", "prompts", "snapshots"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "user text made a control token" in done.stdout
    assert "a damaged snapshot was" in done.stdout
