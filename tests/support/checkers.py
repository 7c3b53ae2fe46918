"""mypy and pyright on files that use the library, as users run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ov_phi3

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(ov_phi3.__file__).resolve().parents[1]
"""The folder that holds the package: `src`, or the `site-packages` that it is installed in."""

_MYPY_LINE = re.compile(r"^(?P<file>.+?):(?P<line>\d+): error: (?P<text>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """An error that a checker reports."""

    file: str
    line: int
    text: str


def mypy(files: Sequence[Path], *flags: str, config: Path | None = None) -> list[Finding]:
    """The errors that mypy finds in files, and in these only."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(config or os.devnull), *flags]
    command += ["--follow-imports=silent"]
    # Another cache than the project's own: the package counts as a library here, and is checked by other rules.
    command += ["--python-version=3.10", "--cache-dir", str(ROOT / ".mypy_cache" / "programs"), "--no-pretty"]
    environment = dict(os.environ)
    if SOURCE.name != "site-packages":  # there mypy finds it by itself, and refuses the path
        environment["MYPYPATH"] = str(SOURCE)
    done = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [Finding(Path(m["file"]).name, int(m["line"]), m["text"]) for m in _MYPY_LINE.finditer(done.stdout)]


def pyright(files: Sequence[Path], folder: Path) -> list[Finding]:
    """The errors that pyright's checker finds in files, in its strict mode.

    It is run as basedpyright, whose package holds the checker and the JavaScript engine for it.

    Args:
        files: the files.
        folder: an empty folder, for its configuration.
    """
    config = {
        "include": [str(file) for file in files],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.10",
        "extraPaths": [str(SOURCE)],
    }
    project = folder / "pyrightconfig.json"
    project.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files)
    return [
        Finding(Path(found["file"]).name, found["range"]["start"]["line"] + 1, found["message"])
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]
