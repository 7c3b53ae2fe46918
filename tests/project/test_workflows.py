"""The workflows in `.github`: pinned, with few permissions, on every system and Python that the package names."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT

import build
import test as test_script

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = re.compile(r"(actions/[\w-]+|pypa/gh-action-pypi-publish)@[0-9a-f]{40} # v\d+\.\d+\.\d+")
WRITES = {("attest", "attestations"), ("attest", "id-token"), ("publish", "id-token")}
RUNNERS = {"ubuntu-24.04", "windows-2025", "macos-15"}


def read(path: Path) -> dict[Any, Any]:
    """A workflow; YAML reads its key `on` as true."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_two() -> None:
    assert [path.stem for path in WORKFLOWS] == ["checks", "release"]


def test_every_action_is_pinned_by_hash_with_its_version_beside_it(workflow: Path) -> None:
    used = re.findall(r"uses: (.+)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [action for action in used if not ACTION.fullmatch(action)] == []


def test_one_action_has_one_hash() -> None:
    used = {use for path in WORKFLOWS for use in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))}
    assert len({use.partition("@")[0] for use in used}) == len(used)


def test_permissions_are_few(workflow: Path) -> None:
    values = read(workflow)
    assert values["permissions"] == {"contents": "read"}
    writes = {
        (name, scope)
        for name, job in values["jobs"].items()
        for scope, right in job.get("permissions", {}).items()
        if right != "read"
    }
    assert writes <= WRITES
    # Nothing is run with a right to write: such a job has only the two actions that need it.
    for name, _ in writes:
        assert all("run" not in step for step in values["jobs"][name]["steps"])


def test_jobs_end_and_keep_no_credentials(workflow: Path) -> None:
    for job in read(workflow)["jobs"].values():
        assert job["timeout-minutes"] <= 180
        runners = job["strategy"]["matrix"]["system"] if "strategy" in job else [job["runs-on"]]
        assert set(runners) <= RUNNERS  # no "latest", which changes under a release
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", "")  # text of an event would be run as a command
            assert "secrets." not in str(step)


def test_the_suite_runs_on_every_system_and_python() -> None:
    matrix = read(ROOT / ".github/workflows/checks.yml")["jobs"]["tests"]["strategy"]["matrix"]
    classifiers = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", classifiers)
    assert set(matrix["system"]) == RUNNERS
    assert "pull_request_target" not in str(read(ROOT / ".github/workflows/checks.yml"))


def test_every_command_is_accepted_by_its_script(workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = set()
    for job in read(workflow)["jobs"].values():
        for step in job["steps"]:
            if "run" not in step:
                continue
            python, script, *arguments = shlex.split(step["run"])
            assert python == "python"
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            if script == "scripts/build.py":
                assert build.parse_arguments().tag == "$TAG"
                continue
            assert script == "scripts/test.py"
            options, for_pytest = test_script.parse_arguments()
            assert for_pytest == []
            stages |= {*options.stage}
            if {"tests", "emulated"} & {*options.stage}:
                assert options.wheel is not None  # never the source tree
    if workflow.stem == "checks":
        assert stages == set(test_script.STAGES)


def test_a_release_is_tested_before_it_is_attested_and_published() -> None:
    jobs = read(ROOT / ".github/workflows/release.yml")["jobs"]
    assert [jobs[name].get("needs") for name in ("build", "test", "attest", "publish")] == [
        None, "build", "test", "attest",
    ]  # fmt: skip
    assert jobs["publish"]["environment"] == "pypi"


# -- the build --------------------------------------------------------------------------------------------------------


def test_the_build_backend_is_locked() -> None:
    lines = build.backend_requirements(build.LOCK).splitlines()
    assert {line.partition("==")[0] for line in lines} >= {*build.BACKEND} - {"tomli"}
    assert all("--hash=sha256:" in line for line in lines)


def test_a_tag_of_another_version_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "build.py", "--out", tmp_path, "--tag", "v99.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: the tag is v99.0, the version in _version.py is {build.version()}; expected v{build.version()}\n"
    )


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ov_phi3-0.0.1-py3-none-any.whl").touch()
    command = [sys.executable, ROOT / "scripts" / "build.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
