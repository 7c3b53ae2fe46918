"""Programs in separate processes, so that a test survives an abort or a hang."""

from __future__ import annotations

import subprocess
import sys


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python program for at most five minutes."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
