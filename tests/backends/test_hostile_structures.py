"""Hostile schemas and grammars in a process of their own: refused or bounded, and the pipeline is usable afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hostile_structures import CASES

SCRIPT = Path(__file__).parents[1] / "support" / "hostile_structures.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of the process is read from /proc")
@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_hostile_structures(tiny_fp32: Path, backend: str) -> None:
    command = [sys.executable, str(SCRIPT), str(tiny_fp32), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert outcomes.keys() == CASES.keys()
    assert all(outcome.endswith(("then length", "then stop")) for outcome in outcomes.values())
    for name in ("deep schema", "many properties", "circle", "two in a circle"):
        assert outcomes[name].startswith("refused"), (name, outcomes)
