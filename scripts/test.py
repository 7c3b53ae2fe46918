"""Check a checkout: make an environment and the test models, then run lint, format, types, docs, audit and tests, and
the tests marked "emulated" on an emulated GPU.

On a CPU the stage "tests" runs in two processes. Unknown arguments go to pytest, in one process, as in ``python
scripts/test.py -k stream``. All stages run, also after a failure. The exit code is 0 only if no stage failed. On a
machine that cannot emulate a GPU, the stage "emulated" prints the reason and counts as not run; see emulated_gpu.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from _environments import ensure_test_environment, install_wheel
from _models import ensure_model
from _paths import ROOT
from _steps import BootstrapError, child_environment, main_of
from emulated_gpu import UnavailableError, ensure_emulated_gpu

TEST_MODELS = ("demo-int4", "demo-fp32", "tiny-fp32", "longrope64-fp32", "longrope256-fp32", "sliding-fp32")
EMULATED_MODELS = ("tiny-fp32", "longrope64-fp32")
STAGES = ("lint", "format", "types", "docs", "audit", "tests", "emulated")
EMULATED_DEVICE = "GPU.0"
# pytest's exit code if the arguments select no test.
NO_TESTS = 5
BUILT_HERE = Path()
# Most of a test is work of one thread: Python, reading and compiling a graph. A module stays in one process, for its
# fixtures. Each process needs up to 5 GB.
PARALLEL = ["-n", "2", "--dist", "loadfile"]


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
    parser.add_argument(
        "--emulated",
        action="store_true",
        help=f"run the tests on an emulated GPU; --device is {EMULATED_DEVICE} unless given",
    )
    parser.add_argument("--stage", action="append", choices=STAGES, help="run only this stage; repeatable")
    parser.add_argument(
        "--wheel",
        type=Path,
        nargs="?",
        const=BUILT_HERE,
        metavar="FOLDER",
        help="test the wheel in this folder, or one that is built now, instead of the source tree",
    )
    parser.add_argument("--venv", type=Path, help="the environment; default: .venv-test, or .venv-test-wheel")
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
        "emulated": ["-m", "pytest", "-m", "emulated", *pytest_arguments],
    }[stage]


def run_stage(
    stage: str, python: Path, pytest_arguments: list[str], env: dict[str, str], *, emulated: bool = False
) -> Outcome:
    """Run a stage, with an emulated GPU if ``emulated``; its output goes to this process's."""
    command = stage_command(stage, pytest_arguments)
    if command is None:
        return Outcome(stage, "nothing to check", 0.0)
    print(f"\n== {stage}: {' '.join(command).removeprefix('-m ')}", flush=True)
    began = time.monotonic()
    if emulated:
        try:
            env = env | ensure_emulated_gpu(python)
        except BootstrapError as error:
            # Optional in the plain run only: the option --emulated demands the GPU.
            optional = stage == "emulated" and isinstance(error, UnavailableError)
            return Outcome(stage, f"{'NOT RUN' if optional else 'FAILED'}: {error}", time.monotonic() - began)
    done = subprocess.run([str(python), *command], cwd=ROOT, check=False, env=env)
    result = "passed" if done.returncode == 0 else f"FAILED (exit code {done.returncode})"
    if done.returncode == NO_TESTS and stage == "emulated" and pytest_arguments:
        result = "nothing to check"
    return Outcome(stage, result, time.monotonic() - began)


def main() -> int:
    """Run the stages and print a summary."""
    options, pytest_arguments = parse_arguments()
    # With --emulated, the stage "tests" runs the tests of the stage "emulated" too.
    default = [stage for stage in STAGES if not (options.emulated and stage == "emulated")]
    stages = [stage for stage in STAGES if stage in (options.stage or default)]
    default_venv = ROOT / (".venv-test" if options.wheel is None else ".venv-test-wheel")
    python = ensure_test_environment(options.venv or default_venv)
    if options.wheel is not None:
        install_wheel(python, None if options.wheel == BUILT_HERE else options.wheel)
    if {"tests", "emulated"} & {*stages} and not os.environ.get("OV_PHI3_MODELS"):
        for name in TEST_MODELS if "tests" in stages else EMULATED_MODELS:
            ensure_model(name, python)
    env = child_environment()
    if options.device or options.emulated:
        env["OV_PHI3_TEST_DEVICE"] = options.device or EMULATED_DEVICE
    on_gpu = env | {"OV_PHI3_TEST_DEVICE": EMULATED_DEVICE}
    parallel = not pytest_arguments and env.get("OV_PHI3_TEST_DEVICE", "CPU") == "CPU"
    outcomes = []
    for stage in stages:
        emulated = stage == "emulated" or (stage == "tests" and options.emulated)
        stage_env = on_gpu if stage == "emulated" else env
        arguments = PARALLEL if stage == "tests" and parallel else pytest_arguments
        outcomes.append(run_stage(stage, python, arguments, stage_env, emulated=emulated))
    print()
    for outcome in outcomes:
        print(f"{outcome.stage:<10}{outcome.result:<26}{outcome.seconds:7.1f} s")
    return 0 if all(not outcome.result.startswith("FAILED") for outcome in outcomes) else 1


if __name__ == "__main__":
    main_of(main)
