"""Audit the packages of the test environment, above all the run-time packages.

With a vulnerability database (pip-audit asks PyPI's, then OSV's), a known vulnerability of any package in the lock is a
failure. If neither database can be reached, the script says so, and that check counts as not done. The other checks
need no network: the installed packages are those of the lock, all dependencies are satisfied, and the run-time packages
are those listed here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _environments import ensure_test_environment
from _lockfile import NOT_LOCKED, Locked, read_lock
from _paths import LOCK, REQUIREMENTS, ROOT
from _steps import BootstrapError, child_environment, main_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LIBRARY = "ov-phi3"
# All packages that `pip install .` installs. A person reviews a new package before it is added: its purpose, its
# authors and its license.
RUN_TIME = ("numpy", "openvino", "openvino-genai", "openvino-telemetry", "openvino-tokenizers")
# Requirements that `pip check` may report as missing: see EXCLUDED in lock.py.
LEFT_OUT = ("torchvision",)
# Vulnerabilities that do not affect this project, by id, with the reason. Remove an entry with the affected version.
ACCEPTED: dict[str, str] = {}
DATABASES = ("pypi", "osv")
ANSWER_S = 15
# Messages of pip-audit if a database cannot be reached; any other exit without a report is an error.
UNREACHABLE = re.compile(
    r"connection|connect to|timed? ?out|resol(ve|ution)|proxy|ssl|HTTPError|service", re.IGNORECASE
)


@dataclass
class Findings:
    """The failures of all checks; a failure requires action."""

    failures: list[str] = field(default_factory=list)

    def check(self, title: str, problems: Sequence[str]) -> None:
        """Print the result of a check, and record its problems."""
        print(f"- {title}: {'ok' if not problems else 'FAILED'}", flush=True)
        for problem in problems:
            print(f"    {problem}", flush=True)
        self.failures += problems


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-test", help="the environment; default: .venv-test")
    parser.add_argument("--lock", type=Path, default=LOCK, help="the lock; default: scripts/requirements-test.lock")
    parser.add_argument("--offline", action="store_true", help="do not contact a database or the package index")
    parser.add_argument(
        "--report",
        type=Path,
        help="read this file instead of a database: the output of --save on a machine with a network",
    )
    parser.add_argument("--save", type=Path, help="write the answer of the database to this file, as pip-audit's JSON")
    parser.add_argument(
        "--site-packages", type=Path, help="check the packages in this folder instead of those of an environment"
    )
    return parser.parse_args()


def normalized(name: str) -> str:
    """Return the normalized name of a package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(folder: Path | None) -> dict[str, metadata.Distribution]:
    """Return the installed packages by name, of this interpreter or of a folder."""
    distributions = metadata.distributions() if folder is None else metadata.distributions(path=[str(folder)])
    return {normalized(distribution.metadata["Name"]): distribution for distribution in distributions}


def applies(marker: str | None, extra: str = "") -> bool:
    """Return whether a marker is true on this machine."""
    # Imported here, so that --help works without any package. The locked environment, which runs the checks, has it.
    from packaging.markers import Marker

    return not marker or Marker(marker).evaluate({"extra": extra})


def pinned_torch() -> str:
    """Return the version of torch in its requirement file."""
    match = re.search(r"(?m)^torch==(\S+)$", (REQUIREMENTS / "torch.txt").read_text(encoding="utf-8"))
    if match is None:
        raise BootstrapError("scripts/requirements/torch.txt pins no version of torch")
    return match[1]


# -- offline ----------------------------------------------------------------------------------------------------------


def differences(packages: Iterable[Locked], versions: Mapping[str, str], torch: str) -> list[str]:
    """Return the differences between the installed versions and the lock."""
    expected = {package.name: package.version for package in packages if applies(package.marker)}
    problems = []
    for name, version in sorted(expected.items()):
        present = versions.get(name)
        if present is None:
            problems.append(f"{name} {version} is in the lock and is not installed")
        elif present != version:
            problems.append(f"{name} {present} is installed, the lock has {version}")
    # The build of torch, such as "+cpu", depends on the index; its version does not.
    if (present := versions.get("torch", "none").partition("+")[0]) != torch:
        problems.append(f"torch {present} is installed, requirements/torch.txt has {torch}")
    additional = sorted(name for name in set(versions) - set(expected) - {LIBRARY} if not NOT_LOCKED.fullmatch(name))
    return [*problems, *(f"{name} {versions[name]} is installed and is not in the lock" for name in additional)]


def unsatisfied(python: str) -> list[str]:
    """Return the problems that `pip check` reports, except packages that are left out on purpose."""
    done = _run([python, "-m", "pip", "check"])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0:
        return []
    expected = re.compile(rf"optimum-intel \S+ requires ({'|'.join(LEFT_OUT)}), which is not installed\.")
    if not lines:
        return [f"pip check: exit code {done.returncode}: {_last_line(done.stderr)}"]
    return [line for line in lines if not expected.fullmatch(line)]


def requirements_of(distribution: metadata.Distribution) -> list[str]:
    """Return the names of a package's requirements on this machine, without its extras."""
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in distribution.requires or []]
    return sorted(
        {normalized(one.name) for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})}
    )


def run_time(packages: Mapping[str, metadata.Distribution]) -> dict[str, list[str]]:
    """Return the direct and indirect dependencies of the library, each with the packages that require it."""
    required_by: dict[str, list[str]] = {}
    pending = [LIBRARY]
    while pending:
        name = pending.pop()
        distribution = packages.get(name)
        for requirement in requirements_of(distribution) if distribution is not None else ():
            if requirement not in required_by:
                pending.append(requirement)
            required_by.setdefault(requirement, []).append(name)
    return dict(sorted(required_by.items()))


def license_of(distribution: metadata.Distribution) -> str:
    """Return the license of a package, as its metadata states it."""
    data: Any = distribution.metadata
    if expression := data.get("License-Expression"):
        return str(expression)
    for classifier in data.get_all("Classifier") or []:
        if classifier.startswith("License ::"):
            return str(classifier.rpartition(" :: ")[2])
    lines = str(data.get("License") or "").strip().splitlines()
    return lines[0].strip() if lines else "not stated"


def closure_problems(
    required_by: Mapping[str, Sequence[str]], packages: Mapping[str, metadata.Distribution]
) -> list[str]:
    """Return run-time packages that differ from RUN_TIME, or were not installed from a published wheel."""
    if LIBRARY not in packages:
        return [f"{LIBRARY} is not installed, so its dependencies are unknown"]
    problems = [
        f"{name} is a new run-time package: review it, then add it to RUN_TIME"
        for name in required_by
        if name not in RUN_TIME
    ]
    unused = [name for name in RUN_TIME if name not in required_by]
    problems += [f"{name} is no longer a run-time package: remove it from RUN_TIME" for name in unused]
    problems += [f"{name} is not installed" for name in required_by if name not in packages]
    for name in required_by:
        wheel = (packages[name].read_text("WHEEL") if name in packages else None) or ""
        # An index accepts no wheel for plain "linux": such a wheel was built here, from source.
        if name in packages and (not wheel or re.search(r"(?m)^Tag: \S+-linux_\w+$", wheel)):
            problems.append(f"{name} was not installed from a published wheel")
    return problems


def print_table(required_by: Mapping[str, Sequence[str]], packages: Mapping[str, metadata.Distribution]) -> None:
    """Print the run-time packages with versions and licenses."""
    rows = [("package", "version", "license", "required by")]
    for name, by in required_by.items():
        package = packages.get(name)
        version, license_name = (package.version, license_of(package)) if package else ("-", "-")
        rows.append((name, version, license_name, ", ".join(by)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("    " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


# -- online -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """The answer of a database: the audited versions, and their vulnerabilities."""

    audited: frozenset[tuple[str, str]]
    vulnerabilities: tuple[str, ...]
    accepted: tuple[str, ...] = ()


def read_answer(report: Any) -> Answer:
    """Read pip-audit's JSON. A skipped package was not audited, whatever the summary says."""
    audited, vulnerabilities, accepted = set(), [], []
    for package in report["dependencies"]:
        if "vulns" not in package:
            continue
        audited.add((normalized(package["name"]), package["version"]))
        for vulnerability in package["vulns"]:
            names = [vulnerability["id"], *vulnerability.get("aliases", [])]
            fixed = ", ".join(vulnerability.get("fix_versions", [])) or "no version yet"
            line = f"{' = '.join(names)}: {package['name']} {package['version']}, fixed in {fixed}"
            reason = next((ACCEPTED[name] for name in names if name in ACCEPTED), None)
            if reason is None:
                vulnerabilities.append(line)
            else:
                accepted.append(f"{line} (accepted: {reason})")
    return Answer(frozenset(audited), tuple(vulnerabilities), tuple(accepted))


def ask(packages: Sequence[tuple[str, str]], database: str) -> tuple[Any, str]:
    """Ask a database about packages; return pip-audit's report, or None with the reason if it cannot be reached.

    Raises:
        BootstrapError: pip-audit failed.
    """
    # pip-audit's input may name a package only once; the lock has several versions of some, for different Pythons.
    rounds: list[dict[str, str]] = []
    for name, version in packages:
        pins = next((one for one in rounds if name not in one), None)
        if pins is None:
            rounds.append(pins := {})
        pins[name] = version
    dependencies = []
    with tempfile.TemporaryDirectory(prefix="ov-phi3-audit-", ignore_cleanup_errors=True) as folder:
        for number, pins in enumerate(rounds):
            requirements, out = Path(folder) / f"{number}.txt", Path(folder) / f"{number}.json"
            requirements.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
            command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
            command += ["--vulnerability-service", database, "--timeout", str(ANSWER_S), "--aliases", "on"]
            done = _run([*command, "--format", "json", "--output", str(out), "--requirement", str(requirements)])
            try:
                dependencies += json.loads(out.read_text(encoding="utf-8"))["dependencies"]
            except (OSError, ValueError, KeyError):
                reason = _last_line(done.stderr)
                if not UNREACHABLE.search(reason):
                    raise BootstrapError(f"pip-audit failed (exit code {done.returncode}): {reason}") from None
                return None, reason
    return {"dependencies": dependencies}, ""


def audit_online(packages: Sequence[tuple[str, str]]) -> Any:
    """Return the report of the first database that answers; None if none does."""
    for database in DATABASES:
        # One package first: pip-audit treats a database without any answer like one without vulnerabilities.
        probe, _ = ask(packages[:1], database)
        if probe is None or not read_answer(probe).audited:
            continue
        report, reason = ask(packages, database)
        if report is not None:
            print(f"- database: {database}", flush=True)
            return report
        print(f"- database {database} stopped answering: {reason}", flush=True)
    return None


def known_vulnerabilities(options: argparse.Namespace, packages: Sequence[tuple[str, str]], findings: Findings) -> bool:
    """Check every package of the lock for known vulnerabilities; return whether that was possible."""
    if options.report is not None:
        try:
            answer = read_answer(json.loads(options.report.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BootstrapError(f"{options.report}: not a report of pip-audit: {error!r}") from None
    elif options.offline:
        print("- known vulnerabilities: NOT CHECKED, because of --offline")
        return False
    else:
        report = audit_online(packages)
        if report is None:
            print("- known vulnerabilities: NOT CHECKED, no vulnerability database can be reached")
            return False
        if options.save is not None:
            options.save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        answer = read_answer(report)
    # A package without an answer does not count as safe.
    missing = [
        f"{name} {version}: not in the database's answer, so it was not audited"
        for name, version in packages
        if (name, version) not in answer.audited
    ]
    for line in answer.accepted:
        print(f"    {line}")
    title = f"known vulnerabilities, {len(answer.audited)} versions of packages audited"
    findings.check(title, [*answer.vulnerabilities, *missing])
    return True


def index_problems(
    names: Iterable[str], packages: Mapping[str, metadata.Distribution], lock: Iterable[Locked]
) -> list[str] | None:
    """Return problems of the run-time packages at the package index; None if the index cannot be reached."""
    pins = [f"{name}=={packages[name].version}" for name in names if name in packages]
    # A dry run, without hashes, so that pip reads only the pages of the index and downloads no wheels.
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    done = _run([*command, "--retries", "0", "--timeout", str(ANSWER_S), "--report", "-", *pins])
    try:
        items = json.loads(done.stdout)["install"]
    except (ValueError, KeyError):
        return None
    hashes = {package.name: package.hashes for package in lock if applies(package.marker)}
    problems = []
    for item in items:
        name, download = normalized(item["metadata"]["name"]), item["download_info"]
        if item.get("is_yanked"):
            problems.append(f"{name} {item['metadata']['version']} was yanked by its authors")
        if not str(download["url"]).partition("#")[0].endswith(".whl"):
            problems.append(f"{name} has source distributions only")
        sha256 = download.get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha256 is not None and sha256 not in hashes.get(name, ()):
            problems.append(f"{name}: the index has a file that is not in the lock, {sha256}")
    return problems


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        cwd=ROOT,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
    )


def _last_line(text: str) -> str:
    """Return the last non-empty line."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def main() -> int:
    """Run the checks and print a summary."""
    options = parse_arguments()
    if options.site_packages is None and Path(sys.prefix).resolve() != options.venv.resolve():
        python = ensure_test_environment(options.venv)
        return subprocess.run([python, __file__, *sys.argv[1:]], check=False, env=child_environment()).returncode
    lock, packages, findings = read_lock(options.lock), installed(options.site_packages), Findings()
    versions = {name: distribution.version for name, distribution in packages.items()}
    findings.check(
        f"{len(packages)} installed packages, against {options.lock.name}",
        differences(lock, versions, pinned_torch()),
    )
    if options.site_packages is None:
        findings.check(f"pip check, without {', '.join(LEFT_OUT)}", unsatisfied(sys.executable))
    required_by = run_time(packages)
    findings.check(f"{len(required_by)} run-time packages, from wheels", closure_problems(required_by, packages))
    print_table(required_by, packages)
    if not options.offline and options.site_packages is None:
        problems = index_problems(required_by, packages, lock)
        if problems is None:
            print("- run-time packages at the index: NOT CHECKED, pip cannot reach an index")
        else:
            findings.check("run-time packages at the index: wheels, not yanked, hashes of the lock", problems)
    everything = sorted({(package.name, package.version) for package in lock} | {("torch", pinned_torch())})
    audited = known_vulnerabilities(options, everything, findings)
    if findings.failures:
        print(f"{len(findings.failures)} problems" if len(findings.failures) > 1 else "1 problem")
        return 1
    print("no problems" if audited else "no problems in the checks that could run; this was not a vulnerability audit")
    return 0


if __name__ == "__main__":
    main_of(main)
