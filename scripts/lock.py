"""Write scripts/requirements-test.lock: every package of the test environment, with version and hashes.

The inputs are pyproject.toml and the files in scripts/requirements. The lock is valid for Python 3.10 to 3.13 on Linux,
Windows and macOS, and this is checked before it is written. Versions that still satisfy the inputs stay unchanged. The
resolver is installed from the package index into a temporary environment.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _environments import venv_python
from _lockfile import NOT_LOCKED, read_lock
from _paths import LOCK, ROOT, new_log
from _steps import main_of, run_step

if TYPE_CHECKING:
    from collections.abc import Sequence

# Resolves for all platforms at once. The version is pinned, so that a new resolver does not change the lock.
RESOLVER = "uv==0.13.9"
REQUIREMENTS = ("torch", "export", "export-no-deps", "test", "docs", "bench")
# Builds the editable install: the build-system of pyproject.toml, and the package that hatchling adds for it.
BUILD = ("hatchling>=1.27", "editables")
# optimum-intel requires it, an export of a language model never uses it, and it would install another torch.
EXCLUDED = ("torchvision",)
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The platforms of OpenVINO's wheels. On Linux some wheels need a newer glibc than the resolver assumes.
PLATFORMS = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_35", "x86_64-pc-windows-msvc", "aarch64-apple-darwin")
HEADER = """\
# Every package of the test environment: exact versions, with the hashes of all their files.
# Made by `python scripts/lock.py`; do not edit. Valid for Python 3.10 to 3.13 on Linux, Windows and macOS.
# Without torch: requirements/torch.txt has its version, and its files depend on the index; see _lockfile.py.
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="use the newest versions that satisfy the inputs")
    parser.add_argument(
        "--upgrade-package",
        action="append",
        default=[],
        metavar="NAME",
        help="use the newest version of this package; repeatable",
    )
    return parser.parse_args()


def compile_command(uv: Sequence[str | Path], inputs: Path, out: Path) -> list[str | Path]:
    """Return the resolver's command; it writes two input files of the resolver to the folder ``inputs``."""
    build, excluded = inputs / "build.in", inputs / "excluded.txt"
    build.write_text("\n".join(BUILD) + "\n", encoding="utf-8")
    excluded.write_text("\n".join(EXCLUDED) + "\n", encoding="utf-8")
    files = [Path("scripts") / "requirements" / f"{name}.txt" for name in REQUIREMENTS]
    command: list[str | Path] = [*uv, "pip", "compile", "pyproject.toml", "--all-extras", *files, build]
    command += ["--universal", "--python-version", PYTHONS[0], "--only-binary", ":all:", "--excludes", excluded]
    # No header and no annotations: both contain paths, and the header may contain the address of the index.
    return [*command, "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "--output-file", out]


def lock_text(resolved: str) -> str:
    """Return the text of the lock for the resolver's output, without the packages that are never locked."""
    blocks = re.split(r"(?m)^(?=\S)", resolved)
    locked = [block for block in blocks if block.strip() and not NOT_LOCKED.fullmatch(re.split("[=;@ ]", block)[0])]
    return HEADER + "".join(locked)


def verify_commands(uv: Sequence[str | Path], lock_file: Path, target: Path) -> list[tuple[str, list[str | Path]]]:
    """Return commands that check, per platform and Python, that every package has a wheel with a locked hash."""
    exact = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--quiet"]
    dry: list[str | Path] = [*uv, "pip", "install", "--dry-run", "--target", target, *exact, "-r", lock_file]
    return [
        (f"{platform}, Python {python}", [*dry, "--python-platform", platform, "--python-version", python])
        for platform in PLATFORMS
        for python in PYTHONS
    ]


def main() -> int:
    """Resolve, check, and replace the lock."""
    options = parse_arguments()
    old = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
    with tempfile.TemporaryDirectory(prefix="ov-phi3-lock-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        log, out, python = new_log("lock"), scratch / "new.lock", venv_python(scratch / "venv")
        run_step("make a temporary environment", [sys.executable, "-m", "venv", scratch / "venv"], log)
        run_step(f"install {RESOLVER}", [python, "-m", "pip", "install", "--progress-bar", "off", RESOLVER], log)
        uv = [python, "-m", "uv", "--cache-dir", scratch / "cache"]
        if not options.upgrade:
            out.write_text(old, encoding="utf-8")  # the resolver keeps the versions in its output file
        chosen = [part for name in options.upgrade_package for part in ("--upgrade-package", name)]
        run_step(f"resolve for Python {PYTHONS[0]} and later", [*compile_command(uv, scratch, out), *chosen], log)
        text = lock_text(out.read_text(encoding="utf-8"))
        out.write_text(text, encoding="utf-8", newline="\n")
        packages = read_lock(out)  # refuses lines that are not versions with hashes, such as addresses and paths
        for title, command in verify_commands(uv, out, scratch / "target"):
            run_step(title, command, log)
    new = LOCK.with_name(f"{LOCK.name}.new")
    new.write_text(text, encoding="utf-8", newline="\n")
    new.replace(LOCK)
    print(f"{LOCK.relative_to(ROOT)}: {len(packages)} packages, {'unchanged' if text == old else 'changed'}")
    return 0


if __name__ == "__main__":
    main_of(main)
