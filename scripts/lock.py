"""Write scripts/requirements-test.lock again: every package of the test environment, with version and hashes.

What goes in is what pyproject.toml and the files in scripts/requirements ask for. The lock holds for Python 3.10 to
3.13 on Linux, Windows and macOS, and this is checked before it is written. Versions that still fit stay as they are.
The resolver comes from the package index, into an environment that is thrown away.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _bootstrap import LOCK, NOT_LOCKED, ROOT, main_of, new_log, read_lock, run_step, venv_python

if TYPE_CHECKING:
    from collections.abc import Sequence

# What resolves for all platforms at once; its version is pinned so that the lock does not change with it unasked.
RESOLVER = "uv==0.13.9"
REQUIREMENTS = ("torch", "export", "export-no-deps", "test", "docs", "bench")
# What builds the editable install: the first as in pyproject.toml's build-system, the second is what hatchling adds.
BUILD = ("hatchling>=1.27", "editables")
# optimum-intel asks for it, an export of a language model never uses it, and it would bring another torch.
EXCLUDED = ("torchvision",)
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Those that OpenVINO has wheels for; for Linux on ARM they ask for a newer glibc than the resolver assumes.
PLATFORMS = ("x86_64-unknown-linux-gnu", "aarch64-manylinux_2_35", "x86_64-pc-windows-msvc", "aarch64-apple-darwin")
HEADER = """\
# Every package of the test environment: exact versions, with the hashes of all files that they may come in.
# Made by `python scripts/lock.py`; do not edit. Holds for Python 3.10 to 3.13 on Linux, Windows and macOS.
# Not here: torch; its version is in requirements/torch.txt, and its file depends on the index: see _bootstrap.py.
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest version of everything that fits")
    parser.add_argument(
        "--upgrade-package",
        action="append",
        default=[],
        metavar="NAME",
        help="take the newest version of this package; can be given more than once",
    )
    return parser.parse_args()


def compile_command(uv: Sequence[str | Path], inputs: Path, out: Path) -> list[str | Path]:
    """Return the resolver's command; ``inputs`` is a folder for the two files that only it reads."""
    build, excluded = inputs / "build.in", inputs / "excluded.txt"
    build.write_text("\n".join(BUILD) + "\n", encoding="utf-8")
    excluded.write_text("\n".join(EXCLUDED) + "\n", encoding="utf-8")
    files = [Path("scripts") / "requirements" / f"{name}.txt" for name in REQUIREMENTS]
    command: list[str | Path] = [*uv, "pip", "compile", "pyproject.toml", "--all-extras", *files, build]
    command += ["--universal", "--python-version", PYTHONS[0], "--only-binary", ":all:", "--excludes", excluded]
    # Neither header nor annotations: both hold paths, and the header the index where one is given.
    return [*command, "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "--output-file", out]


def lock_text(resolved: str) -> str:
    """Return the lock's text for what the resolver wrote: without the packages that are not locked."""
    blocks = re.split(r"(?m)^(?=\S)", resolved)
    kept = [block for block in blocks if block.strip() and not NOT_LOCKED.fullmatch(re.split("[=;@ ]", block)[0])]
    return HEADER + "".join(kept)


def verify_commands(uv: Sequence[str | Path], lock_file: Path, target: Path) -> list[tuple[str, list[str | Path]]]:
    """Return what shows that every package has a wheel with a locked hash, for each platform and Python."""
    exact = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--quiet"]
    dry: list[str | Path] = [*uv, "pip", "install", "--dry-run", "--target", target, *exact, "-r", lock_file]
    return [
        (f"{platform}, Python {python}", [*dry, "--python-platform", platform, "--python-version", python])
        for platform in PLATFORMS
        for python in PYTHONS
    ]


def main() -> int:
    """Resolve, check, and put the new lock in its place."""
    options = parse_arguments()
    old = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
    with tempfile.TemporaryDirectory(prefix="ov-phi3-lock-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        log, out, python = new_log("lock"), scratch / "new.lock", venv_python(scratch / "venv")
        run_step("make a throw-away environment", [sys.executable, "-m", "venv", scratch / "venv"], log)
        run_step(f"install {RESOLVER}", [python, "-m", "pip", "install", "--progress-bar", "off", RESOLVER], log)
        uv = [python, "-m", "uv", "--cache-dir", scratch / "cache"]
        if not options.upgrade:
            out.write_text(old, encoding="utf-8")  # the resolver keeps to what its output file says already
        chosen = [part for name in options.upgrade_package for part in ("--upgrade-package", name)]
        run_step(f"resolve for Python {PYTHONS[0]} and later", [*compile_command(uv, scratch, out), *chosen], log)
        text = lock_text(out.read_text(encoding="utf-8"))
        out.write_text(text, encoding="utf-8", newline="\n")
        packages = read_lock(out)  # refuses whatever is not a version with hashes, an address or a path for instance
        for title, command in verify_commands(uv, out, scratch / "target"):
            run_step(title, command, log)
    new = LOCK.with_name(f"{LOCK.name}.new")
    new.write_text(text, encoding="utf-8", newline="\n")
    new.replace(LOCK)
    print(f"{LOCK.relative_to(ROOT)}: {len(packages)} packages, {'unchanged' if text == old else 'changed'}")
    return 0


if __name__ == "__main__":
    main_of(main)
