"""What the command line imports before it knows what to do: Tab and --help wait for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("numpy", "openvino", "openvino_genai", "prompt_toolkit", "rich", "fastapi", "ov_phi3.backends.registry")


@pytest.mark.parametrize(
    "arguments", [["__complete", "gen"], ["--help"], ["generate", "m", "x", "--temperature", "-1"]]
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom ov_phi3.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
