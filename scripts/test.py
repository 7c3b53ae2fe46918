"""Check a checkout: make an environment and the test models, then run lint, format, types, docs, audit and tests.

Unknown arguments go to pytest, as in ``python scripts/test.py -k stream``. All stages run, also after a failure. The
exit code is 0 only if every stage passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from _environments import ensure_test_environment
from _models import ensure_model
from _paths import ROOT
from _steps import child_environment, main_of

TEST_MODELS = ("demo-int4", "demo-fp32", "tiny-fp32", "longrope64-fp32", "longrope256-fp32", "sliding-fp32")
STAGES = ("lint", "format", "types", "docs", "audit", "tests")


@dataclass(frozen=True)
class Outcome:
    """Result and duration of a stage."""

    stage: str
    result: str
    seconds: float


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: the options of this script, and the arguments for pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", help="device for the tests that need one; default: OV_PHI3_TEST_DEVICE, or CPU")
    parser.add_argument("--stage", action="append", choices=STAGES, help="run only this stage; repeatable")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-test", help="the environment; default: .venv-test")
    return parser.parse_known_args()


def stage_command(stage: str, pytest_arguments: list[str]) -> list[str] | None:
    """Return the arguments of the interpreter for a stage; None if there is nothing to check."""
    if stage == "docs" and not (ROOT / "mkdocs.yml").exists():
        return None
    return {
        "lint": ["-m", "ruff", "check", "."],
        "format": ["-m", "ruff", "format", "--check", "."],
        "types": ["-m", "mypy"],
        "docs": ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(ROOT / "site")],
        "audit": ["scripts/audit.py"],
        "tests": ["-m", "pytest", *pytest_arguments],
    }[stage]


def run_stage(stage: str, python: Path, pytest_arguments: list[str], env: dict[str, str]) -> Outcome:
    """Run a stage; its output goes to this process's."""
    command = stage_command(stage, pytest_arguments)
    if command is None:
        return Outcome(stage, "nothing to check", 0.0)
    print(f"\n== {stage}: {' '.join(command).removeprefix('-m ')}", flush=True)
    began = time.monotonic()
    done = subprocess.run([str(python), *command], cwd=ROOT, check=False, env=env)
    result = "passed" if done.returncode == 0 else f"FAILED (exit code {done.returncode})"
    return Outcome(stage, result, time.monotonic() - began)


def main() -> int:
    """Run the stages and print a summary."""
    options, pytest_arguments = parse_arguments()
    stages = [stage for stage in STAGES if options.stage is None or stage in options.stage]
    python = ensure_test_environment(options.venv)
    if "tests" in stages and not os.environ.get("OV_PHI3_MODELS"):
        for name in TEST_MODELS:
            ensure_model(name, python)
    env = child_environment()
    if options.device:
        env["OV_PHI3_TEST_DEVICE"] = options.device
    outcomes = [run_stage(stage, python, pytest_arguments, env) for stage in stages]
    print()
    for outcome in outcomes:
        print(f"{outcome.stage:<8}{outcome.result:<26}{outcome.seconds:7.1f} s")
    return 0 if all(not outcome.result.startswith("FAILED") for outcome in outcomes) else 1


if __name__ == "__main__":
    main_of(main)
