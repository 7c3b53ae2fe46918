"""Programs in processes of their own, so that an abort or a hang is seen from outside."""

from __future__ import annotations

import subprocess
import sys


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end; at most five minutes."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
