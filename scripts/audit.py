"""Audit the packages of the test environment, the run-time ones above all.

With a vulnerability database (pip-audit asks PyPI's, then OSV's): a known vulnerability of any package in the lock is a
failure. Where neither can be reached, one sentence says so, and that part counts as not done. Always: what is installed
is what the lock says, dependencies are satisfied, and the run-time packages are those that are known here.
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

from _bootstrap import (
    LOCK,
    NOT_LOCKED,
    REQUIREMENTS,
    ROOT,
    BootstrapError,
    Locked,
    child_environment,
    ensure_test_environment,
    main_of,
    read_lock,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LIBRARY = "ov-phi3"
# Everything that `pip install ov-phi3` installs. A package that joins these is looked at by a person first: what it
# does, who makes it, and its license.
RUN_TIME = ("numpy", "openvino", "openvino-genai", "openvino-telemetry", "openvino-tokenizers")
# What `pip check` may miss: see EXCLUDED in lock.py.
LEFT_OUT = ("torchvision",)
# Vulnerabilities that do not concern us, by id, each with the reason; an entry is removed with the version it is about.
ACCEPTED: dict[str, str] = {}
DATABASES = ("pypi", "osv")
ANSWER_S = 15
# How pip-audit ends where a database is out of reach; any other end without a report is a fault, and not passed over.
UNREACHABLE = re.compile(
    r"connection|connect to|timed? ?out|resol(ve|ution)|proxy|ssl|HTTPError|service", re.IGNORECASE
)


@dataclass
class Findings:
    """What the checks found; a failure is anything that somebody has to act on."""

    failures: list[str] = field(default_factory=list)

    def check(self, title: str, problems: Sequence[str]) -> None:
        """Print how a check went, and keep its problems."""
        print(f"- {title}: {'ok' if not problems else 'FAILED'}", flush=True)
        for problem in problems:
            print(f"    {problem}", flush=True)
        self.failures += problems


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-test", help="the environment; default: .venv-test")
    parser.add_argument("--lock", type=Path, default=LOCK, help="the lock; default: scripts/requirements-test.lock")
    parser.add_argument("--offline", action="store_true", help="ask neither a database nor the package index")
    parser.add_argument(
        "--report",
        type=Path,
        help="read this instead of asking a database: what --save wrote on a machine that reaches one",
    )
    parser.add_argument("--save", type=Path, help="write what the database said to this file, in pip-audit's JSON")
    parser.add_argument(
        "--site-packages", type=Path, help="look at the packages in this folder, not at those of an environment"
    )
    return parser.parse_args()


def normalized(name: str) -> str:
    """Return the one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(folder: Path | None) -> dict[str, metadata.Distribution]:
    """Return the installed packages by name, of this interpreter or of a folder."""
    found = metadata.distributions() if folder is None else metadata.distributions(path=[str(folder)])
    return {normalized(distribution.metadata["Name"]): distribution for distribution in found}


def applies(marker: str | None, extra: str = "") -> bool:
    """Tell whether a marker is true on this machine."""
    # Not at the top: --help works without any package. What runs the checks is the locked environment, which has it.
    from packaging.markers import Marker

    return not marker or Marker(marker).evaluate({"extra": extra})


def pinned_torch() -> str:
    """Return the version of torch that its requirement file pins."""
    match = re.search(r"(?m)^torch==(\S+)$", (REQUIREMENTS / "torch.txt").read_text(encoding="utf-8"))
    if match is None:
        raise BootstrapError("scripts/requirements/torch.txt pins no version of torch")
    return match[1]


# -- offline ----------------------------------------------------------------------------------------------------------


def differences(packages: Iterable[Locked], versions: Mapping[str, str], torch: str) -> list[str]:
    """Return where the installed versions are not those of the lock."""
    expected = {package.name: package.version for package in packages if applies(package.marker)}
    problems = []
    for name, version in sorted(expected.items()):
        found = versions.get(name)
        if found is None:
            problems.append(f"{name} {version} is in the lock and is not installed")
        elif found != version:
            problems.append(f"{name} {found} is installed, the lock has {version}")
    # The build of torch, "+cpu" for instance, is the index's choice; its version is not.
    if (found := versions.get("torch", "none").partition("+")[0]) != torch:
        problems.append(f"torch {found} is installed, requirements/torch.txt has {torch}")
    more = sorted(name for name in set(versions) - set(expected) - {LIBRARY} if not NOT_LOCKED.fullmatch(name))
    return [*problems, *(f"{name} {versions[name]} is installed and is not in the lock" for name in more)]


def unsatisfied(python: str) -> list[str]:
    """Return what `pip check` complains about, without what is left out on purpose."""
    done = _run([python, "-m", "pip", "check"])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0:
        return []
    known = re.compile(rf"optimum-intel \S+ requires ({'|'.join(LEFT_OUT)}), which is not installed\.")
    if not lines:
        return [f"pip check: exit code {done.returncode}: {_last_words(done.stderr)}"]
    return [line for line in lines if not known.fullmatch(line)]


def requirements_of(distribution: metadata.Distribution) -> list[str]:
    """Return the names of what a package needs on this machine, without its extras."""
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in distribution.requires or []]
    return sorted({normalized(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})})


def run_time(packages: Mapping[str, metadata.Distribution]) -> dict[str, list[str]]:
    """Return what the library brings along, each with the packages that ask for it."""
    asked_by: dict[str, list[str]] = {}
    waiting = [LIBRARY]
    while waiting:
        name = waiting.pop()
        distribution = packages.get(name)
        for needed in requirements_of(distribution) if distribution is not None else ():
            if needed not in asked_by:
                waiting.append(needed)
            asked_by.setdefault(needed, []).append(name)
    return dict(sorted(asked_by.items()))


def license_of(distribution: metadata.Distribution) -> str:
    """Return the license of a package in a few words, as its metadata states it."""
    data: Any = distribution.metadata
    if expression := data.get("License-Expression"):
        return str(expression)
    for classifier in data.get_all("Classifier") or []:
        if classifier.startswith("License ::"):
            return str(classifier.rpartition(" :: ")[2])
    lines = str(data.get("License") or "").strip().splitlines()
    return lines[0].strip() if lines else "not stated"


def closure_problems(asked_by: Mapping[str, Sequence[str]], packages: Mapping[str, metadata.Distribution]) -> list[str]:
    """Return where the run-time packages are not those that are known here, or were not installed from a wheel."""
    if LIBRARY not in packages:
        return [f"{LIBRARY} is not installed, so that its dependencies are not known"]
    problems = [
        f"{name} is new among the run-time packages: look at it, then see RUN_TIME"
        for name in asked_by
        if name not in RUN_TIME
    ]
    problems += [f"{name} is no run-time package any more: see RUN_TIME" for name in RUN_TIME if name not in asked_by]
    problems += [f"{name} is not installed" for name in asked_by if name not in packages]
    for name in asked_by:
        wheel = (packages[name].read_text("WHEEL") if name in packages else None) or ""
        # An index takes no wheel for plain "linux": such a one was built here, from source.
        if name in packages and (not wheel or re.search(r"(?m)^Tag: \S+-linux_\w+$", wheel)):
            problems.append(f"{name} was not installed from a published wheel")
    return problems


def print_table(asked_by: Mapping[str, Sequence[str]], packages: Mapping[str, metadata.Distribution]) -> None:
    """Print the run-time packages with versions and licenses."""
    rows = [("package", "version", "license", "asked for by")]
    for name, by in asked_by.items():
        known = packages.get(name)
        rows.append((name, known.version if known else "-", license_of(known) if known else "-", ", ".join(by)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("    " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


# -- online -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a database said: about which packages, and what is wrong with them."""

    audited: frozenset[tuple[str, str]]
    vulnerabilities: tuple[str, ...]
    accepted: tuple[str, ...] = ()


def read_answer(report: Any) -> Answer:
    """Read pip-audit's JSON. A package that it skipped was not audited, whatever its summary says."""
    audited, bad, accepted = set(), [], []
    for package in report["dependencies"]:
        if "vulns" not in package:
            continue
        audited.add((normalized(package["name"]), package["version"]))
        for known in package["vulns"]:
            names = [known["id"], *known.get("aliases", [])]
            fixed = ", ".join(known.get("fix_versions", [])) or "no version yet"
            line = f"{' = '.join(names)}: {package['name']} {package['version']}, fixed in {fixed}"
            reason = next((ACCEPTED[name] for name in names if name in ACCEPTED), None)
            if reason is None:
                bad.append(line)
            else:
                accepted.append(f"{line} (accepted: {reason})")
    return Answer(frozenset(audited), tuple(bad), tuple(accepted))


def ask(packages: Sequence[tuple[str, str]], database: str) -> tuple[Any, str]:
    """Ask a database about packages: pip-audit's report, or None with the reason if it cannot be reached.

    Raises:
        BootstrapError: pip-audit did not work.
    """
    # Its input may name a package only once; the lock has other versions of some for other Pythons.
    rounds: list[dict[str, str]] = []
    for name, version in packages:
        free = next((one for one in rounds if name not in one), None)
        if free is None:
            rounds.append(free := {})
        free[name] = version
    dependencies = []
    with tempfile.TemporaryDirectory(prefix="ov-phi3-audit-", ignore_cleanup_errors=True) as folder:
        for number, chosen in enumerate(rounds):
            listed, out = Path(folder) / f"{number}.txt", Path(folder) / f"{number}.json"
            listed.write_text("".join(f"{name}=={version}\n" for name, version in chosen.items()), encoding="utf-8")
            command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
            command += ["--vulnerability-service", database, "--timeout", str(ANSWER_S), "--aliases", "on"]
            done = _run([*command, "--format", "json", "--output", str(out), "--requirement", str(listed)])
            try:
                dependencies += json.loads(out.read_text(encoding="utf-8"))["dependencies"]
            except (OSError, ValueError, KeyError):
                reason = _last_words(done.stderr)
                if not UNREACHABLE.search(reason):
                    raise BootstrapError(f"pip-audit failed (exit code {done.returncode}): {reason}") from None
                return None, reason
    return {"dependencies": dependencies}, ""


def audit_online(packages: Sequence[tuple[str, str]]) -> Any:
    """Ask the databases in turn for a report; None where none of them answers."""
    for database in DATABASES:
        # One package first: pip-audit takes a database that knows nothing at all for one that knows of no trouble.
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
    """Check every package of the lock for known vulnerabilities; tell whether that was done."""
    if options.report is not None:
        try:
            answer = read_answer(json.loads(options.report.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BootstrapError(f"{options.report}: not a report of pip-audit: {error!r}") from None
    elif options.offline:
        print("- known vulnerabilities: NOT CHECKED, as --offline says")
        return False
    else:
        report = audit_online(packages)
        if report is None:
            print("- known vulnerabilities: NOT CHECKED, since no vulnerability database can be reached from here")
            return False
        if options.save is not None:
            options.save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        answer = read_answer(report)
    # Silence about a package is not a clean bill for it.
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
    """Return what the package index says against the run-time packages; None where it cannot be asked."""
    pins = [f"{name}=={packages[name].version}" for name in names if name in packages]
    # Nothing is installed; without hashes, so that pip reads the index's pages and downloads no whole wheels.
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    done = _run([*command, "--retries", "0", "--timeout", str(ANSWER_S), "--report", "-", *pins])
    try:
        found = json.loads(done.stdout)["install"]
    except (ValueError, KeyError):
        return None
    hashes = {package.name: package.hashes for package in lock if applies(package.marker)}
    problems = []
    for item in found:
        name, download = normalized(item["metadata"]["name"]), item["download_info"]
        if item.get("is_yanked"):
            problems.append(f"{name} {item['metadata']['version']} was yanked by its makers")
        if not str(download["url"]).partition("#")[0].endswith(".whl"):
            problems.append(f"{name} comes as source only")
        sha256 = download.get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha256 is not None and sha256 not in hashes.get(name, ()):
            problems.append(f"{name}: the index has a file that is not in the lock, {sha256}")
    return problems


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it says."""
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


def _last_words(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def main() -> int:
    """Run the checks and sum up."""
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
    asked_by = run_time(packages)
    findings.check(f"{len(asked_by)} run-time packages, from wheels", closure_problems(asked_by, packages))
    print_table(asked_by, packages)
    if not options.offline and options.site_packages is None:
        problems = index_problems(asked_by, packages, lock)
        if problems is None:
            print("- run-time packages at the index: NOT CHECKED, since pip reaches none")
        else:
            findings.check("run-time packages at the index: wheels, not yanked, hashes of the lock", problems)
    everything = sorted({(package.name, package.version) for package in lock} | {("torch", pinned_torch())})
    audited = known_vulnerabilities(options, everything, findings)
    if findings.failures:
        print(f"{len(findings.failures)} problems" if len(findings.failures) > 1 else "1 problem")
        return 1
    print("no problems" if audited else "no problems in what could be checked; this was not a vulnerability audit")
    return 0


if __name__ == "__main__":
    main_of(main)
