"""The lock of the test environment: complete, exact, valid for every supported platform."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import _environments
import _lockfile
import _paths
import _steps
import lock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKED = _lockfile.read_lock(_paths.LOCK)
HASH = "--hash=sha256:" + 64 * "0"


def machine(python: str, system: str, platform: str, processor: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": processor,
        "os_name": "nt" if platform == "win32" else "posix",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }


PLATFORMS = (("Linux", "linux", "x86_64"), ("Windows", "win32", "AMD64"), ("Darwin", "darwin", "arm64"))
MACHINES = [machine(python, *platform) for python, platform in itertools.product(lock.PYTHONS, PLATFORMS)]


def name_of(here: dict[str, str]) -> str:
    return f"{here['platform_system']}-{here['python_version']}"


def locked_on(here: dict[str, str]) -> list[_lockfile.Locked]:
    return [package for package in LOCKED if not package.marker or Marker(package.marker).evaluate(here)]


def all_requirements() -> list[Requirement]:
    """Every requirement of pyproject.toml and of the requirement files that make the test environment."""
    project = PYPROJECT["project"]
    lines = [*PYPROJECT["build-system"]["requires"], *project["dependencies"]]
    lines += itertools.chain(*project["optional-dependencies"].values())
    for name in lock.REQUIREMENTS:
        text = (_paths.REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("here", MACHINES, ids=name_of)
def test_the_lock_satisfies_every_requirement(here: dict[str, str]):
    versions = {package.name: package.version for package in locked_on(here)}
    requirements = [one for one in all_requirements() if one.marker is None or one.marker.evaluate(here)]
    assert len(requirements) > 30
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue
        assert name in versions, f"{requirement} is not in the lock: python scripts/lock.py"
        assert requirement.specifier.contains(versions[name]), f"{requirement}: {versions[name]} is locked"


@pytest.mark.parametrize("here", MACHINES, ids=name_of)
def test_the_lock_has_one_version_per_package_and_machine(here: dict[str, str]):
    names = [package.name for package in locked_on(here)]
    assert sorted(set(names)) == sorted(names)


def test_the_lock_contains_no_address_and_no_path():
    comments, lines = [], []
    for line in _paths.LOCK.read_text(encoding="utf-8").splitlines(keepends=True):
        (comments if "#" in line else lines).append(line)
    assert "".join(comments) == lock.HEADER
    assert "://" not in lock.HEADER
    assert [line for line in lines if re.search(r"[/@]|\\.|file:|--(?!hash=sha256:)", line.rstrip())] == []


def test_the_lock_leaves_out_packages_that_differ_between_indexes():
    assert [package.name for package in LOCKED if _lockfile.NOT_LOCKED.fullmatch(package.name)] == []
    resolved = (
        f"a==1 \\\n    {HASH}\nnvidia-x==2 ; sys_platform == 'linux' \\\n    {HASH}\ntorch==2\nz==3 \\\n    {HASH}\n"
    )
    assert lock.lock_text(resolved) == f"{lock.HEADER}a==1 \\\n    {HASH}\nz==3 \\\n    {HASH}\n"


@pytest.mark.parametrize(
    "line",
    [
        "a==1",
        f"a>=1 {HASH}",
        f"a @ file:///a.whl {HASH}",
        "--extra-index-url x",
        "-e .",
        "a==1 --hash=md5:0",
        "a==1 \\",
    ],
)
def test_a_lock_line_that_is_not_a_version_with_hashes_is_refused(line: str, tmp_path: Path):
    (tmp_path / "some.lock").write_text(f"b==2 ; python_version < '3' \\\n    {HASH} \\\n    {HASH}\n{line}\n")
    with pytest.raises(_steps.BootstrapError, match="not one version of a package"):
        _lockfile.read_lock(tmp_path / "some.lock")


def test_a_lock_with_windows_line_ends_reads_the_same(tmp_path: Path):
    (tmp_path / "some.lock").write_bytes(_paths.LOCK.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert _lockfile.read_lock(tmp_path / "some.lock") == LOCKED


def test_an_environment_is_made_again_when_its_lock_changes(tmp_path: Path):
    changed = tmp_path / "changed.lock"
    changed.write_bytes(_paths.LOCK.read_bytes())
    same, other = (
        _environments.environment_stamp(tmp_path, ["torch"], lock_file=path) for path in (_paths.LOCK, changed)
    )
    assert same == other
    changed.write_text(f"a==1 {HASH}\n")
    assert _environments.environment_stamp(tmp_path, ["torch"], lock_file=changed) != same


def test_the_test_environment_installs_hashed_wheels_first_and_resolves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OV_PHI3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_environments, "starts", lambda *_: True)
    commands: list[list[str]] = []
    monkeypatch.setattr(
        _environments, "run_step", lambda title, command, log, **_: commands.append([*map(str, command)])
    )
    _environments.ensure_test_environment(tmp_path / "venv")
    venv, packages, torch, library = commands
    assert venv[1:3] == ["-m", "venv"]
    assert packages[-2:] == ["-r", str(_paths.LOCK)]
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(packages)
    assert torch[-1].endswith("torch.txt")
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(library)


def test_the_lock_covers_the_supported_pythons_and_the_build_backend():
    classifiers = PYPROJECT["project"]["classifiers"]
    assert set(lock.PYTHONS) == {line.rpartition(" ")[2] for line in classifiers if re.search(r":: 3\.\d+$", line)}
    assert [one for one in PYPROJECT["build-system"]["requires"] if one not in lock.BUILD] == []
