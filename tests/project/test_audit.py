"""`scripts/audit.py`, offline and with a substitute for pip-audit."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import _lockfile
import _paths
import _steps
import audit

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LOCKED = _lockfile.read_lock(_paths.LOCK)


class Environment:
    """A folder with the metadata of the packages of the lock, as installed on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        requirements = {
            "ov-phi3": ["openvino>=2026", "openvino-genai", "openvino-tokenizers", "numpy", 'pytest; extra == "dev"'],
            "openvino": ["numpy", "openvino-telemetry"],
            "openvino-genai": ["openvino_tokenizers"],
        }
        versions = {package.name: package.version for package in LOCKED if audit.applies(package.marker)}
        for name, version in {**versions, "torch": f"{audit.pinned_torch()}+cpu", "ov-phi3": "0.1.0"}.items():
            self.add(name, version, requirements.get(name, ()))

    def add(self, name: str, version: str, requirements: Any = (), tag: str = "py3-none-any") -> None:
        self.remove(name)
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", "License-Expression: MIT"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {tag}\n")

    def remove(self, name: str) -> None:
        for info in self.folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
            for file in info.iterdir():
                file.unlink()
            info.rmdir()

    def audit(self, *arguments: str | Path) -> tuple[int, str]:
        """Run the audit as a program; return its exit code and its output."""
        command = [sys.executable, SCRIPTS / "audit.py", "--site-packages", self.folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "site-packages")


def test_an_environment_as_locked_passes_but_does_not_count_as_audited(environment: Environment):
    code, output = environment.audit("--offline")
    assert code == 0, output
    assert "known vulnerabilities: NOT CHECKED" in output
    assert "this was not a vulnerability audit" in output
    assert re.search(r"openvino-telemetry +\S+ +MIT +openvino\n", output)


def test_a_changed_a_missing_and_an_additional_package_are_failures(environment: Environment):
    environment.add("idna", "0.1")
    environment.add("left-pad", "1.0")
    environment.add("torch", "1.0+cpu")
    environment.add("nvidia-cublas", "13.1")  # came with torch, from an index that has its CUDA build only
    environment.remove("pluggy")
    code, output = environment.audit("--offline")
    assert code == 1
    assert "idna 0.1 is installed, the lock has" in output
    assert "left-pad 1.0 is installed and is not in the lock" in output
    assert "torch 1.0 is installed, requirements/torch.txt has" in output
    assert re.search(r"pluggy \S+ is in the lock and is not installed", output)
    assert "4 problems" in output


def test_a_new_run_time_package_is_a_failure(environment: Environment):
    telemetry = next(package.version for package in LOCKED if package.name == "openvino-telemetry")
    environment.add("openvino-telemetry", telemetry, ["requests"])
    code, output = environment.audit("--offline")
    assert code == 1
    assert "requests is a new run-time package" in output


def test_a_run_time_package_that_was_built_here_is_a_failure(environment: Environment):
    version = next(package.version for package in LOCKED if package.name == "openvino")
    environment.add("openvino", version, ["numpy", "openvino-telemetry"], tag="cp311-cp311-linux_x86_64")
    code, output = environment.audit("--offline")
    assert code == 1
    assert "openvino was not installed from a published wheel" in output


def everything() -> list[dict[str, Any]]:
    """The packages of a report: all known to the database, none with a vulnerability."""
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


def test_a_report_without_vulnerabilities_passes(environment: Environment, tmp_path: Path):
    code, output = environment.audit("--report", report(tmp_path, everything()))
    assert code == 0, output
    assert "NOT CHECKED" not in output
    assert output.endswith("no problems\n")


def test_a_known_vulnerability_is_a_failure_with_its_id_and_the_fixed_version(environment: Environment, tmp_path: Path):
    code, output = environment.audit("--report", report(tmp_path, with_vulnerability()))
    assert code == 1
    assert re.search(r"PYSEC-2026-1 = CVE-2026-1: numpy \S+, fixed in 99\.1", output)


def test_a_skipped_package_counts_as_not_audited(environment: Environment, tmp_path: Path):
    packages = [package for package in everything() if package["name"] != "openvino"]
    code, output = environment.audit(
        "--report", report(tmp_path, [*packages, {"name": "openvino", "skip_reason": "?"}])
    )
    assert code == 1
    assert re.search(r"openvino \S+: not in the database's answer, so it was not audited", output)


def test_an_invalid_report_is_an_error_of_one_line(environment: Environment, tmp_path: Path):
    (tmp_path / "report.json").write_text("[]")
    code, output = environment.audit("--report", tmp_path / "report.json")
    assert code == 1
    assert "not a report of pip-audit" in output


def test_an_accepted_vulnerability_passes_and_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert all(reason.strip() for reason in audit.ACCEPTED.values())
    monkeypatch.setitem(audit.ACCEPTED, "CVE-2026-1", "never called")
    answer = audit.read_answer({"dependencies": with_vulnerability()})
    assert answer.vulnerabilities == ()
    assert "accepted: never called" in answer.accepted[0]


def fake_pip_audit(monkeypatch: pytest.MonkeyPatch, written: Any, stderr: str = "", code: int = 1) -> list[str]:
    """Replace pip-audit; return the list of the databases that it is called for."""
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
def test_an_unreachable_database_is_not_an_audit(monkeypatch: pytest.MonkeyPatch, written: Any, stderr: str):
    asked = fake_pip_audit(monkeypatch, written, stderr)
    assert audit.audit_online(PINS) is None
    assert asked == ["pypi", "osv"]  # one package each, and not the whole list


def test_a_reachable_database_is_asked_about_every_version(monkeypatch: pytest.MonkeyPatch):
    asked = fake_pip_audit(monkeypatch, {"vulns": []}, code=0)
    assert audit.read_answer(audit.audit_online(PINS)).audited == set(PINS)
    assert set(asked) == {"pypi"}


def test_a_saved_report_can_be_read_on_another_machine(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_pip_audit(monkeypatch, {"vulns": []}, code=0)
    saved = tmp_path / "saved.json"
    monkeypatch.setattr(sys, "argv", ["audit.py", "--site-packages", str(environment.folder), "--save", str(saved)])
    assert audit.main() == 0
    code, output = environment.audit("--report", saved)
    assert code == 0, output
    assert output.endswith("no problems\n")


def test_a_failing_pip_audit_is_an_error(monkeypatch: pytest.MonkeyPatch):
    fake_pip_audit(monkeypatch, None, "No module named pip_audit")
    with pytest.raises(_steps.BootstrapError, match="No module named pip_audit"):
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
def test_a_vulnerability_fails_the_audit_stage(
    packages: Any,
    result: str,
    environment: Environment,
    tmp_path: Path,
    check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
):
    assert "audit" in check.STAGES
    command = check.stage_command("audit", [])
    more = ["--site-packages", str(environment.folder), "--report", str(report(tmp_path, packages()))]
    monkeypatch.setattr(check, "stage_command", lambda *_: [*command, *more])
    outcome = check.run_stage("audit", Path(sys.executable), [], _steps.child_environment())
    assert outcome.result == result


@pytest.mark.parametrize("script", ["lock.py", "audit.py"])
def test_help_works_without_any_package(script: str, tmp_path: Path):
    command = [sys.executable, "-S", "-E", "-s", str(SCRIPTS / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
