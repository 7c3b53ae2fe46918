"""Python without asserts and docstrings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("option", ["-O", "-OO"])
@pytest.mark.parametrize(
    "more", ["", ", concurrency=2", ", backend='infer_request'", ", ov_config={'ATTENTION_BACKEND': 'SDPA'}"]
)
def test_an_optimised_python_runs_models(tiny_fp32: Path, option: str, more: str) -> None:
    script = (
        "import sys, ov_phi3\n"
        f"pipe = ov_phi3.load({str(tiny_fp32)!r}, 'CPU'{more})\n"
        "print(len(pipe.generate('hi', max_new_tokens=3, ignore_eos=True).token_ids))\n"
        "assert 'openvino_tokenizers' not in sys.modules or hasattr(sys.modules['openvino_tokenizers'], '__path__')\n"
    )
    done = subprocess.run([sys.executable, option, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
