"""What is installed to check the library, what it brings along to its users, and what its code never does."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ov_phi3

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SOURCE = ROOT / "src" / "ov_phi3"
sys.path[:0] = [str(SCRIPTS)]

import _bootstrap  # noqa: E402
import audit  # noqa: E402
import lock  # noqa: E402

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKED = _bootstrap.read_lock(_bootstrap.LOCK)
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


def locked_on(here: dict[str, str]) -> list[_bootstrap.Locked]:
    return [package for package in LOCKED if not package.marker or Marker(package.marker).evaluate(here)]


def wanted() -> list[Requirement]:
    """Every requirement of pyproject.toml and of the requirement files that make the test environment."""
    project = PYPROJECT["project"]
    lines = [*PYPROJECT["build-system"]["requires"], *project["dependencies"]]
    lines += itertools.chain(*project["optional-dependencies"].values())
    for name in lock.REQUIREMENTS:
        text = (_bootstrap.REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [Requirement(line) for line in lines]


# -- the lock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", MACHINES, ids=name_of)
def test_the_lock_satisfies_everything_that_is_asked_for(here: dict[str, str]):
    versions = {package.name: package.version for package in locked_on(here)}
    asked = [one for one in wanted() if one.marker is None or one.marker.evaluate(here)]
    assert len(asked) > 30
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue
        assert name in versions, f"{requirement} is not in the lock: python scripts/lock.py"
        assert requirement.specifier.contains(versions[name]), f"{requirement}: {versions[name]} is locked"


@pytest.mark.parametrize("here", MACHINES, ids=name_of)
def test_the_lock_has_one_version_of_a_package_for_a_machine(here: dict[str, str]):
    names = [package.name for package in locked_on(here)]
    assert sorted(set(names)) == sorted(names)


def test_the_lock_names_no_address_and_no_place():
    comments, lines = [], []
    for line in _bootstrap.LOCK.read_text(encoding="utf-8").splitlines(keepends=True):
        (comments if "#" in line else lines).append(line)
    assert "".join(comments) == lock.HEADER
    assert "://" not in lock.HEADER
    assert [line for line in lines if re.search(r"[/@]|\\.|file:|--(?!hash=sha256:)", line.rstrip())] == []


def test_the_lock_leaves_out_what_differs_between_indexes():
    assert [package.name for package in LOCKED if _bootstrap.NOT_LOCKED.fullmatch(package.name)] == []
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
def test_a_line_that_is_not_one_version_with_hashes_is_refused(line: str, tmp_path: Path):
    (tmp_path / "some.lock").write_text(f"b==2 ; python_version < '3' \\\n    {HASH} \\\n    {HASH}\n{line}\n")
    with pytest.raises(_bootstrap.BootstrapError, match="not one version of a package"):
        _bootstrap.read_lock(tmp_path / "some.lock")


def test_a_lock_with_windows_line_ends_is_the_same(tmp_path: Path):
    (tmp_path / "some.lock").write_bytes(_bootstrap.LOCK.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert _bootstrap.read_lock(tmp_path / "some.lock") == LOCKED


def test_an_environment_is_made_again_when_its_lock_changes(tmp_path: Path):
    changed = tmp_path / "changed.lock"
    changed.write_bytes(_bootstrap.LOCK.read_bytes())
    same, other = (
        _bootstrap.environment_stamp(tmp_path, ["torch"], lock_file=path) for path in (_bootstrap.LOCK, changed)
    )
    assert same == other
    changed.write_text(f"a==1 {HASH}\n")
    assert _bootstrap.environment_stamp(tmp_path, ["torch"], lock_file=changed) != same


def test_the_test_environment_takes_hashed_wheels_first_and_resolves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OV_PHI3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_bootstrap, "_starts", lambda *_: True)
    commands: list[list[str]] = []
    monkeypatch.setattr(_bootstrap, "run_step", lambda title, command, log, **_: commands.append([*map(str, command)]))
    _bootstrap.ensure_test_environment(tmp_path / "venv")
    venv, packages, torch, library = commands
    assert venv[1:3] == ["-m", "venv"]
    assert packages[-2:] == ["-r", str(_bootstrap.LOCK)]
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(packages)
    assert torch[-1].endswith("torch.txt")
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(library)


def test_the_lock_is_made_for_what_the_project_supports():
    classifiers = PYPROJECT["project"]["classifiers"]
    assert set(lock.PYTHONS) == {line.rpartition(" ")[2] for line in classifiers if re.search(r":: 3\.\d+$", line)}
    assert [one for one in PYPROJECT["build-system"]["requires"] if one not in lock.BUILD] == []


# -- the audit --------------------------------------------------------------------------------------------------------


class Environment:
    """A folder that looks like the packages of the lock, as installed on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        needs = {
            "ov-phi3": ["openvino>=2026", "openvino-genai", "openvino-tokenizers", "numpy", 'pytest; extra == "dev"'],
            "openvino": ["numpy", "openvino-telemetry"],
            "openvino-genai": ["openvino_tokenizers"],
        }
        versions = {package.name: package.version for package in LOCKED if audit.applies(package.marker)}
        for name, version in {**versions, "torch": f"{audit.pinned_torch()}+cpu", "ov-phi3": "0.1.0"}.items():
            self.add(name, version, needs.get(name, ()))

    def add(self, name: str, version: str, needs: Any = (), tag: str = "py3-none-any") -> None:
        self.remove(name)
        place = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", "License-Expression: MIT"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        (place / "METADATA").write_text("\n".join(lines) + "\n")
        (place / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {tag}\n")

    def remove(self, name: str) -> None:
        for place in self.folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
            for file in place.iterdir():
                file.unlink()
            place.rmdir()

    def audit(self, *arguments: str | Path) -> tuple[int, str]:
        """Run the audit as people do; its exit code and what it says."""
        command = [sys.executable, SCRIPTS / "audit.py", "--site-packages", self.folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def made_up(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "site-packages")


def test_an_environment_as_locked_passes_and_is_not_called_audited(made_up: Environment):
    code, said = made_up.audit("--offline")
    assert code == 0, said
    assert "known vulnerabilities: NOT CHECKED" in said
    assert "this was not a vulnerability audit" in said
    assert re.search(r"openvino-telemetry +\S+ +MIT +openvino\n", said)


def test_another_version_a_missing_and_an_additional_package_are_failures(made_up: Environment):
    made_up.add("idna", "0.1")
    made_up.add("left-pad", "1.0")
    made_up.add("torch", "1.0+cpu")
    made_up.add("nvidia-cublas", "13.1")  # came with torch, from an index that has its CUDA build only
    made_up.remove("pluggy")
    code, said = made_up.audit("--offline")
    assert code == 1
    assert "idna 0.1 is installed, the lock has" in said
    assert "left-pad 1.0 is installed and is not in the lock" in said
    assert "torch 1.0 is installed, requirements/torch.txt has" in said
    assert re.search(r"pluggy \S+ is in the lock and is not installed", said)
    assert "4 problems" in said


def test_a_new_package_at_run_time_is_a_failure_until_somebody_looked_at_it(made_up: Environment):
    telemetry = next(package.version for package in LOCKED if package.name == "openvino-telemetry")
    made_up.add("openvino-telemetry", telemetry, ["requests"])
    code, said = made_up.audit("--offline")
    assert code == 1
    assert "requests is new among the run-time packages" in said


def test_a_package_at_run_time_that_was_built_here_is_a_failure(made_up: Environment):
    version = next(package.version for package in LOCKED if package.name == "openvino")
    made_up.add("openvino", version, ["numpy", "openvino-telemetry"], tag="cp311-cp311-linux_x86_64")
    code, said = made_up.audit("--offline")
    assert code == 1
    assert "openvino was not installed from a published wheel" in said


def everything() -> list[dict[str, Any]]:
    """A report's packages, all of them known to the database and none with a vulnerability."""
    pins = [*((package.name, package.version) for package in LOCKED), ("torch", audit.pinned_torch())]
    return [{"name": name, "version": version, "vulns": []} for name, version in pins]


def report(folder: Path, packages: list[dict[str, Any]]) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps({"dependencies": packages, "fixes": []}))
    return path


def with_vulnerability() -> list[dict[str, Any]]:
    packages = everything()
    chosen = next(package for package in packages if package["name"] == "numpy")
    chosen["vulns"] = [
        {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["99.1"], "description": "bad"}
    ]
    return packages


def test_a_clean_report_on_every_package_passes(made_up: Environment, tmp_path: Path):
    code, said = made_up.audit("--report", report(tmp_path, everything()))
    assert code == 0, said
    assert "NOT CHECKED" not in said
    assert said.endswith("no problems\n")


def test_a_known_vulnerability_is_a_failure_with_its_id_and_what_fixes_it(made_up: Environment, tmp_path: Path):
    code, said = made_up.audit("--report", report(tmp_path, with_vulnerability()))
    assert code == 1
    assert re.search(r"PYSEC-2026-1 = CVE-2026-1: numpy \S+, fixed in 99\.1", said)


def test_a_package_that_the_database_skipped_was_not_audited(made_up: Environment, tmp_path: Path):
    packages = [package for package in everything() if package["name"] != "openvino"]
    code, said = made_up.audit("--report", report(tmp_path, [*packages, {"name": "openvino", "skip_reason": "?"}]))
    assert code == 1
    assert re.search(r"openvino \S+: not in the database's answer, so it was not audited", said)


def test_what_is_no_report_is_said_in_one_line(made_up: Environment, tmp_path: Path):
    (tmp_path / "report.json").write_text("[]")
    code, said = made_up.audit("--report", tmp_path / "report.json")
    assert code == 1
    assert "not a report of pip-audit" in said


def test_an_accepted_vulnerability_passes_and_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert all(reason.strip() for reason in audit.ACCEPTED.values())
    monkeypatch.setitem(audit.ACCEPTED, "CVE-2026-1", "never called")
    answer = audit.read_answer({"dependencies": with_vulnerability()})
    assert answer.vulnerabilities == ()
    assert "accepted: never called" in answer.accepted[0]


def fake_pip_audit(monkeypatch: pytest.MonkeyPatch, written: Any, stderr: str = "", code: int = 1) -> list[str]:
    """Put something in the place of pip-audit; the databases that it was asked for."""
    asked: list[str] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(command[command.index("--vulnerability-service") + 1])
        names = Path(command[-1]).read_text().splitlines()
        assert len({name.partition("==")[0] for name in names}) == len(names)
        if written is not None:
            pins = (name.split("==") for name in names)
            packages = [{"name": name, "version": version, **written} for name, version in pins]
            Path(command[command.index("--output") + 1]).write_text(json.dumps({"dependencies": packages}))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(audit, "_run", run)
    return asked


PINS = [("a", "1"), ("a", "2"), ("b", "1")]


@pytest.mark.parametrize(
    ("written", "stderr"),
    [
        ({"skip_reason": "not found"}, "No known vulnerabilities found"),
        (None, "x.ConnectionError: Max retries exceeded"),
    ],
)
def test_a_database_out_of_reach_is_no_audit(monkeypatch: pytest.MonkeyPatch, written: Any, stderr: str):
    asked = fake_pip_audit(monkeypatch, written, stderr)
    assert audit.audit_online(PINS) is None
    assert asked == ["pypi", "osv"]  # one package each, and not the whole list


def test_a_database_that_answers_is_asked_about_every_version(monkeypatch: pytest.MonkeyPatch):
    asked = fake_pip_audit(monkeypatch, {"vulns": []}, code=0)
    assert audit.read_answer(audit.audit_online(PINS)).audited == set(PINS)
    assert set(asked) == {"pypi"}


def test_what_one_machine_saves_another_one_reads(
    made_up: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_pip_audit(monkeypatch, {"vulns": []}, code=0)
    saved = tmp_path / "saved.json"
    monkeypatch.setattr(sys, "argv", ["audit.py", "--site-packages", str(made_up.folder), "--save", str(saved)])
    assert audit.main() == 0
    code, said = made_up.audit("--report", saved)
    assert code == 0, said
    assert said.endswith("no problems\n")


def test_a_pip_audit_that_does_not_work_is_not_taken_for_a_database_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    fake_pip_audit(monkeypatch, None, "No module named pip_audit")
    with pytest.raises(_bootstrap.BootstrapError, match="No module named pip_audit"):
        audit.audit_online(PINS)


@pytest.fixture
def check() -> ModuleType:
    """`scripts/test.py`, whose name is that of a standard module."""
    spec = importlib.util.spec_from_file_location("ov_phi3_scripts_test", SCRIPTS / "test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("packages", "result"), [(everything, "passed"), (with_vulnerability, "FAILED (exit code 1)")])
def test_a_vulnerability_turns_the_stage_red(
    packages: Any,
    result: str,
    made_up: Environment,
    tmp_path: Path,
    check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
):
    assert "audit" in check.STAGES
    command = check.stage_command("audit", [])
    more = ["--site-packages", str(made_up.folder), "--report", str(report(tmp_path, packages()))]
    monkeypatch.setattr(check, "stage_command", lambda *_: [*command, *more])
    outcome = check.run_stage("audit", Path(sys.executable), [], _bootstrap.child_environment())
    assert outcome.result == result


@pytest.mark.parametrize("script", ["lock.py", "audit.py"])
def test_help_needs_no_package(script: str, tmp_path: Path):
    command = [sys.executable, "-S", "-E", "-s", str(SCRIPTS / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- the code ---------------------------------------------------------------------------------------------------------

RUNS_WHAT_IT_READS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
CALLS = {"eval", "exec", "__import__"}
ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "unsafe_load")}


def hazards(source: str) -> list[str]:
    """Return what in a module can run code that somebody else wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            found += [a.name for a in node.names if (node.module, a.name) in ATTRIBUTES or a.name in CALLS]
        elif isinstance(node, ast.Name) and node.id in CALLS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            found += [".".join(pair)] if pair in ATTRIBUTES or (pair[0] == "builtins" and pair[1] in CALLS) else []
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell", "trust_remote_code"):
            harmless = isinstance(node.value, ast.Constant) and node.value.value is False
            passed_on = node.arg == "trust_remote_code" and not isinstance(node.value, ast.Constant)
            found += [] if harmless or passed_on else [f"{node.arg}={ast.unparse(node.value)}"]
        found += [name for name in names if name.partition(".")[0] in RUNS_WHAT_IT_READS]
    return found


MODULES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_module_runs_code_that_it_reads(module: Path):
    assert hazards(module.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import pickle",
        "from marshal import loads",
        "import concurrent, shelve",
        "x = eval('1')",
        "run = exec",
        "import builtins\nbuiltins.exec('1')",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_such_a_module_would_be_found(source: str):
    assert hazards(source) != []
    assert hazards("import re, numpy\nre.compile('x')\nnumpy.load('x', allow_pickle=False)\nf(shell=False)") == []


def test_only_the_export_knows_of_code_that_comes_with_a_model():
    knows = {path.relative_to(SOURCE).as_posix() for path in MODULES if "trust_remote_code" in path.read_text("utf-8")}
    assert {name for name in knows if not name.startswith("_export/")} == {"exporter.py", "cli/tools.py"}
    assert inspect.signature(ov_phi3.export).parameters["trust_remote_code"].default is False


def test_no_file_of_scripts_names_a_host():
    paths = [path for path in SCRIPTS.rglob("*") if path.suffix in (".py", ".txt", ".json", ".lock", ".in", ".toml")]
    assert _bootstrap.LOCK in paths
    assert [path for path in paths if re.search(r"://|pypi\.org|pythonhosted", path.read_text(encoding="utf-8"))] == []
