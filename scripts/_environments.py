"""Python environments for the scripts, made with venv and pip and reused while their inputs stay the same.

An environment is either complete or counts as absent: its stamp is written last.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _paths import LOCK, REQUIREMENTS, ROOT, digest, new_log
from _process_lock import lock
from _steps import BootstrapError, child_environment, run_step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "STAMP",
    "clear_environment",
    "ensure_environment",
    "ensure_test_environment",
    "environment_stamp",
    "install_commands",
    "install_wheel",
    "is_current",
    "starts",
    "venv_command",
    "venv_python",
]

MARKER = ".ov-phi3-environment"
STAMP = ".ov-phi3-stamp"


def venv_python(venv: Path) -> Path:
    """Return the interpreter of an environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def venv_command(venv: Path, name: str) -> Path:
    """Return the path of a command that is installed in an environment."""
    return venv_python(venv).with_name(f"{name}.exe" if os.name == "nt" else name)


def environment_stamp(
    venv: Path, requirements: Sequence[str], *, library: bool = True, lock_file: Path | None = None
) -> str:
    """Return a hash of all inputs of an environment; it is made again when the hash changes.

    The path is an input, since an environment cannot be moved. The library's code is not, since it is installed
    editable.
    """
    files = [REQUIREMENTS / f"{name}.txt" for name in requirements]
    if lock_file is not None:
        files.append(lock_file)
    checkout: tuple[str | Path, ...] = (str(ROOT), ROOT / "pyproject.toml") if library else ()
    return digest(str(venv), *checkout, sys.version, sys.base_prefix, *requirements, *files)


def starts(venv: Path, modules: str = "ov_phi3, pip") -> bool:
    """Return whether the interpreter of an environment can import the modules.

    It cannot once the Python that the environment was made from is removed.
    """
    try:
        done = subprocess.run(
            [venv_python(venv), "-c", f"import {modules}"],
            capture_output=True,
            check=False,
            timeout=120,
            env=child_environment(),
            cwd=tempfile.gettempdir(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def is_current(venv: Path, stamp: str, works: Callable[[Path], bool] = starts) -> bool:
    """Return whether an environment is complete, has the stamp and still works."""
    try:
        text = (venv / STAMP).read_text(encoding="utf-8")
    except OSError:
        return False
    return text == stamp and works(venv)


def clear_environment(venv: Path) -> None:
    """Remove an environment that a script made.

    Raises:
        BootstrapError: The folder was not made by a script, or cannot be removed.
    """
    if not venv.exists():
        return
    if not (venv / MARKER).exists() and any(venv.iterdir()):
        raise BootstrapError(
            f"{venv} exists and was not made by this script: move it, or pass --venv with another path"
        )
    # The stamp goes first, so that an interrupted removal leaves nothing that looks complete. The marker goes last, so
    # that the next run can continue the removal.
    (venv / STAMP).unlink(missing_ok=True)
    try:
        for entry in venv.iterdir():
            if entry.name == MARKER:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        shutil.rmtree(venv)
    except OSError as error:
        raise BootstrapError(
            f"cannot remove the old environment {venv}: {error}; is a program in it still running?"
        ) from None


def install_commands(
    python: Path, requirements: Sequence[str], *, library: bool = True, lock_file: Path | None = None
) -> list[tuple[str, list[str | Path]]]:
    """Return the titles and pip commands that fill an environment, in order; the requirement files say why."""
    pip: list[str | Path] = [python, "-m", "pip", "install", "--progress-bar", "off"]
    if lock_file is not None:
        return _locked_commands(pip, requirements, library, lock_file)
    torch = REQUIREMENTS / "torch.txt"
    exporter = "export" in requirements
    commands: list[tuple[str, list[str | Path]]] = []
    if exporter:
        commands.append(("install torch", [*pip, "-r", torch]))
    files: list[str | Path] = [part for name in requirements for part in ("-r", REQUIREMENTS / f"{name}.txt")]
    constraint: list[str | Path] = ["-c", torch] if exporter else []
    editable: list[str | Path] = ["-e", ROOT] if library else []
    title = f"install {'ov-phi3 and ' if library else ''}{', '.join(requirements)} packages"
    commands.append((title, [*pip, *editable, *files, *constraint]))
    if exporter:
        commands.append(("install the exporter", [*pip, "--no-deps", "-r", REQUIREMENTS / "export-no-deps.txt"]))
    return commands


def _locked_commands(
    pip: list[str | Path], requirements: Sequence[str], library: bool, lock_file: Path
) -> list[tuple[str, list[str | Path]]]:
    """Return the titles and pip commands that fill an environment from a lock file."""
    # Wheels only: building a source distribution runs its code, and downloads its build requirements past the lock.
    exact: list[str | Path] = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    commands = [(f"install the packages of {lock_file.name}", [*pip, *exact, "-r", lock_file])]
    # After the lock, so that pip finds torch's dependencies installed in the locked versions.
    commands += [(f"install {name}", [*pip, "-r", REQUIREMENTS / f"{name}.txt"]) for name in requirements]
    if library:
        # The lock has the build backend, so pip downloads nothing here.
        editable: list[str | Path] = ["--no-deps", "--no-index", "--no-build-isolation", "-e", ROOT]
        commands.append(("install ov-phi3", [*pip, *editable]))
    return commands


def ensure_test_environment(venv: Path) -> Path:
    """Make the test environment from the lock, or reuse it; return its interpreter."""
    return ensure_environment(venv, ["torch"], lock_file=LOCK)


def wheel_commands(python: Path, built: Path | None, scratch: Path) -> list[tuple[str, list[str | Path]]]:
    """Return the titles and pip commands that replace the library in an environment by its wheel.

    Args:
        python: The environment's interpreter; it has the build backend.
        built: Folder that holds the wheel; None builds one.
        scratch: An empty folder.
    """
    pip: list[str | Path] = [python, "-m", "pip"]
    commands: list[tuple[str, list[str | Path]]] = []
    if built is None:
        build: list[str | Path] = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", scratch, ROOT]
        commands.append(("build the wheel", [*pip, "wheel", *build]))
    install: list[str | Path] = ["--no-deps", "--no-index", "--force-reinstall", "--find-links", built or scratch]
    # Not the project's name alone: pip would also take a source archive that lies beside the wheel.
    commands.append(("install the wheel", [*pip, "install", *install, "--only-binary", ":all:", "ov-phi3"]))
    return commands


def install_wheel(python: Path, built: Path | None) -> None:
    """Replace the library in an environment by its wheel, so that tests cannot see the source tree.

    Raises:
        BootstrapError: It cannot be built or installed, or another copy of the library is imported.
    """
    with tempfile.TemporaryDirectory(prefix="ov-phi3-wheel-", ignore_cleanup_errors=True) as folder:
        log = new_log("install-wheel")
        for title, command in wheel_commands(python, built and built.absolute(), Path(folder)):
            run_step(title, command, log)
        code = "import ov_phi3; print(ov_phi3.__file__)"
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=False, env=child_environment(), cwd=folder
        )
    if "site-packages" not in done.stdout:
        raise BootstrapError(f"the wheel is not what is imported: {(done.stdout or done.stderr).strip()[-200:]}")


def ensure_environment(
    venv: Path,
    requirements: Sequence[str],
    *,
    library: bool = True,
    variables: Mapping[str, str] | None = None,
    lock_file: Path | None = None,
) -> Path:
    """Make an environment, or reuse it; return its interpreter.

    Args:
        venv: Its folder.
        requirements: Names of the requirement files to install.
        library: Install the library too (editable).
        variables: Environment variables for the builds of packages that have source distributions only.
        lock_file: Lock file whose packages are installed first and checked against its hashes.

    Raises:
        BootstrapError: The environment cannot be made, or does not start.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python can get this far
        raise BootstrapError(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}")
    venv = venv.absolute()
    names = [*requirements, *(("torch", "export-no-deps") if "export" in requirements else ())]
    stamp = environment_stamp(venv, names, library=library, lock_file=lock_file)

    def works(folder: Path) -> bool:
        return starts(folder) if library else starts(folder, "pip")

    with lock(f"environment-{digest(str(venv))[:12]}"):
        if is_current(venv, stamp, works):
            print(f"- environment {venv}: up to date", flush=True)
            return venv_python(venv)
        clear_environment(venv)
        venv.mkdir(parents=True)
        (venv / MARKER).write_text("Made by a script of ov-phi3, which may remove it.\n", encoding="utf-8")
        log = new_log(f"install-{venv.name.strip('.')}")
        run_step(f"make the environment {venv}", [sys.executable, "-m", "venv", venv], log)
        commands = install_commands(venv_python(venv), requirements, library=library, lock_file=lock_file)
        for title, command in commands:
            run_step(title, command, log, variables=variables)
        if not works(venv):
            raise BootstrapError(f"the new environment {venv} does not start -- log: {log}")
        (venv / STAMP).write_text(stamp, encoding="utf-8")
    return venv_python(venv)
