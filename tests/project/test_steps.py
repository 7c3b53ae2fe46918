"""Steps, locks between processes, and `--help` of the scripts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import _process_lock
import _steps

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_a_failed_step_is_one_line_with_the_last_output_and_the_log(tmp_path: Path):
    command = [sys.executable, "-c", "import sys; print('much\\noutput'); sys.exit('it broke')"]
    with pytest.raises(_steps.BootstrapError) as caught:
        _steps.run_step("do it", command, tmp_path / "do.log")
    assert str(caught.value) == f"do it failed (exit code 1): it broke -- log: {tmp_path / 'do.log'}"
    assert "much" in (tmp_path / "do.log").read_text()


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import _process_lock
with _process_lock.lock("x"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(cache: Path, code: str = HOLD) -> subprocess.Popen[str]:
    """Start another process, and wait for its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(SCRIPTS)], stdout=subprocess.PIPE, text=True, env=os.environ | {}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_excludes_other_processes_and_ends_with_its_process(cache: Path, capfd: pytest.CaptureFixture[str]):
    with holder(cache) as process:
        path = cache / "locks" / "x.lock"
        handle = os.open(path, os.O_RDWR)
        try:
            assert not _process_lock.try_lock(handle)
        finally:
            os.close(handle)
            process.kill()
    began = time.monotonic()
    with _process_lock.lock("x"):
        pass
    assert time.monotonic() - began < 5
    assert path.exists()


@pytest.mark.parametrize("script", ["quickstart.py", "test.py"])
def test_help_works_without_packages_from_any_directory(script: str, tmp_path: Path, cache: Path):
    # -S -E -s: no installed package is importable, only the standard library and the checkout.
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-s", str(SCRIPTS / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout
    assert not cache.exists()
