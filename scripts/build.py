"""Build the wheel and the source archive with the locked build backend, and check them.

Two builds of one commit give the same wheel, byte by byte: the time stamps in it are the commit's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from _environments import venv_python
from _lockfile import read_lock
from _paths import LOCK, ROOT, new_log
from _steps import BootstrapError, main_of, run_step

if TYPE_CHECKING:
    from collections.abc import Sequence

# hatchling and all that it needs, by the names in the lock.
BACKEND = ("hatchling", "packaging", "pathspec", "pluggy", "tomli", "trove-classifiers")
VERSION = ROOT / "src" / "ov_phi3" / "_version.py"
IN_ARCHIVE = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "src/ov_phi3/__init__.py",
    "scripts/test.py",
    "docs/examples/ask.py",
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the files; default: dist")
    parser.add_argument("--tag", help="tag of the release, such as v0.1.0; the version in the code must be this one")
    return parser.parse_args()


def version() -> str:
    """Return the version in the code."""
    match = re.search(r'^__version__ = "(.+)"$', VERSION.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise BootstrapError(f'{VERSION} has no line __version__ = "..."')
    return match[1]


def backend_requirements(lock_file: Path) -> str:
    """Return the lines of the lock for the build backend, as text of a requirements file."""
    lines = []
    for package in read_lock(lock_file):
        if package.name in BACKEND:
            marker = f" ; {package.marker}" if package.marker else ""
            hashes = " ".join(f"--hash=sha256:{value}" for value in package.hashes)
            lines.append(f"{package.name}=={package.version}{marker} {hashes}")
    return "\n".join(lines) + "\n"


def commit_time() -> str:
    """Return the time of the checked-out commit, in seconds; a fixed time outside a repository."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "1577836800"


def check(files: Sequence[Path]) -> None:
    """Check the names and the contents of the built files.

    Raises:
        BootstrapError: A file is missing, has another version, or does not hold what it should.
    """
    wheels = [file for file in files if file.suffix == ".whl"]
    archives = [file for file in files if file.name.endswith(".tar.gz")]
    if len(wheels) != 1 or len(archives) != 1 or len(files) != 2:
        raise BootstrapError(f"expected one wheel and one source archive, not {[file.name for file in files]}")
    prefix = f"ov_phi3-{version()}"
    if wheels[0].name != f"{prefix}-py3-none-any.whl" or archives[0].name != f"{prefix}.tar.gz":
        raise BootstrapError(f"{[file.name for file in files]} are not of version {version()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = wheel.namelist()
    if strangers := [name for name in names if not name.startswith(("ov_phi3/", f"{prefix}.dist-info/"))]:
        raise BootstrapError(f"{wheels[0].name} holds files of no package: {strangers[:5]}")
    if "ov_phi3/py.typed" not in names:
        raise BootstrapError(f"{wheels[0].name} lacks ov_phi3/py.typed")
    with tarfile.open(archives[0]) as archive:
        held = set(archive.getnames())
    if missing := [name for name in IN_ARCHIVE if f"{prefix}/{name}" not in held]:
        raise BootstrapError(f"{archives[0].name} lacks {missing}")


def main() -> int:
    """Build into an empty folder, check, and list the files."""
    options = parse_arguments()
    if options.tag is not None and options.tag != f"v{version()}":
        raise BootstrapError(
            f"the tag is {options.tag}, the version in {VERSION.name} is {version()}; expected v{version()}"
        )
    out = options.out.absolute()
    if out.exists() and any(out.iterdir()):
        raise BootstrapError(f"{out} is not empty: empty it, so that no file of another build is published")
    with tempfile.TemporaryDirectory(prefix="ov-phi3-build-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        requirements, python, log = scratch / "backend.txt", venv_python(scratch / "venv"), new_log("build")
        requirements.write_text(backend_requirements(LOCK), encoding="utf-8")
        run_step("make a temporary environment", [sys.executable, "-m", "venv", scratch / "venv"], log)
        exact = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
        install = [python, "-m", "pip", "install", "--progress-bar", "off", *exact, "-r", requirements]
        run_step("install the build backend", install, log)
        times = {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", commit_time())}
        run_step("build", [python, "-m", "hatchling", "build", "-d", out], log, variables=times)
    files = sorted(out.iterdir())
    check(files)
    for file in files:
        print(f"{file.stat().st_size:>9,}  {file}")
    return 0


if __name__ == "__main__":
    main_of(main)
