"""A tokenizer that the interpreter frees last of all does not crash it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HOLDERS = {
    "global": "",
    "cycle": "t.self = t",
    "exit handler": "import atexit; atexit.register(lambda t=t: None); del t",
    "class": "class Holder: held = t\ndel t",
    "builtins": "import builtins; t.self = t; builtins.held = t; del t",
    "codecs": "import codecs; t.self = t; codecs.register(lambda name, t=t: None); del t",
    "audit hook": "import sys; sys.addaudithook(lambda *_, t=t: None); del t",
    "profile": "import sys; sys.setprofile(lambda *_, t=t: None); del t",
    "fork hook": "import os; os.register_at_fork(after_in_child=lambda t=t: None) if hasattr(os, 'fork') else 0; del t",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_tokenizer_that_is_freed_last(tiny_fp32: Path, holder: str) -> None:
    script = f"import ov_phi3\nt = ov_phi3.Tokenizer({str(tiny_fp32)!r})\n{HOLDERS[holder]}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
