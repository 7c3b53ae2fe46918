"""What the scripts that people run from a checkout share: environments, long steps with progress, and models in a
cache.

Standard library only, since it runs before anything is installed; Linux, macOS and Windows. Everything made here is
either whole or absent: an environment counts once its stamp is written, a model once its directory is renamed into
place, and locks belong to the operating system, which frees them with the process that held them, however it ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "scripts" / "models"
REQUIREMENTS = ROOT / "scripts" / "requirements"
# Every package of the test environment with its version and its hashes; scripts/lock.py writes it.
LOCK = ROOT / "scripts" / "requirements-test.lock"
# Never in the lock: torch, and what only torch brings along. An index of CPU builds and the public one have the same
# torch==X in different files (and versions, X+cpu), so a hash would shut one of them out, and the CUDA packages come
# with some of these files only. torchvision is what optimum-intel asks for and an export never uses.
NOT_LOCKED = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.+")
EXPORTER = (
    "optimum-intel",
    "optimum",
    "nncf",
    "transformers",
    "tokenizers",
    "torch",
    "openvino",
    "openvino-tokenizers",
)


def longrope(boundary: int, context: int) -> dict[str, object]:
    """Options of a tiny LongRoPE model; its factors lie far apart, so that a wrong one shows in the next token."""
    factors = {"short_factor": [1 + i / 50 for i in range(8)], "long_factor": [1.5 + i * 3 / 8 for i in range(8)]}
    return {
        "seed": boundary,
        "max_position_embeddings": context,
        "original_max_position_embeddings": boundary,
        "rope_scaling": {"type": "longrope", **factors},
    }


# Options of scripts/models/tiny_phi3.py; the window of "sliding" is Phi-3-mini-4k's.
TINY: dict[str, dict[str, object]] = {
    "tiny": {},
    "longrope64": longrope(64, 1024),
    "longrope256": {**longrope(256, 2048), "kv_heads": 2},
    "sliding": {"seed": 3, "sliding_window": 2047},
}
# Phi-3-mini-4k's sizes, for as many layers as the name says: "mini32" is as large as the real one.
MINI: dict[str, object] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "heads": 32,
    "sliding_window": 2047,
    "dtype": "float16",
}
BASES = ("demo", *TINY, "mini<layers>")
RECIPES = ("int4", "int4-max", "int8", "fp16", "fp32")

MARKER = ".ov-phi3-environment"
STAMP = ".ov-phi3-stamp"
HEARTBEAT_S = 30.0
POLL_S = 0.2
UNUSED_S = 30 * 24 * 3600.0


class BootstrapError(RuntimeError):
    """Something a person can act on, in one line."""


# -- steps with progress ----------------------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    """Return seconds the way people say them."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _last_line(log: Path, size: int = 4096) -> str:
    """Return the last line of a log that says something; progress bars redraw theirs with carriage returns."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


class Display:
    """Shows one running step: a line that is redrawn in a terminal, plain lines now and then everywhere else."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.began = time.monotonic()
        self._live = sys.stdout.isatty()
        self._beat = self.began
        self._width = 0
        if not self._live:
            print(f"- {title} ...", flush=True)

    @property
    def elapsed(self) -> str:
        """Time since the step began."""
        return _duration(time.monotonic() - self.began)

    def tick(self, detail: str = "") -> None:
        """Show that the step is alive, with the latest thing that it said."""
        now = time.monotonic()
        if self._live:
            spinner = "|/-\\"[int((now - self.began) / POLL_S) % 4]
            self._draw(f"{spinner} {self.title} ({self.elapsed}) {detail}")
        elif now - self._beat >= HEARTBEAT_S:
            self._beat = now
            print(f"  still at it: {self.title} ({self.elapsed})", flush=True)

    def end(self, outcome: str) -> None:
        """Replace the live line by the outcome."""
        line = f"- {self.title}: {outcome}, {self.elapsed}"
        if self._live:
            self._draw(line)
            print(flush=True)
        else:
            print(line, flush=True)

    def _draw(self, line: str) -> None:
        line = line[: shutil.get_terminal_size().columns - 1].encode("ascii", "replace").decode()
        print("\r" + line.ljust(self._width), end="", flush=True)
        self._width = len(line)


def child_environment() -> dict[str, str]:
    """Return the environment for children: nothing of the caller's Python leaks in, and all of them speak UTF-8."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return env | {
        "PYTHONUTF8": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "OV_PHI3_CACHE": str(cache_dir()),
    }


def run_step(
    title: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a command with progress, its output in ``log``; a failure is a ``BootstrapError`` with its last words."""
    display = Display(title)
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(part) for part in command]
    with log.open("ab") as out:
        out.write(f"\n$ {subprocess.list2cmdline(arguments)}\n".encode())
        out.flush()
        try:
            process = subprocess.Popen(
                arguments,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env={**child_environment(), **(variables or {})},
            )
        except OSError as error:
            raise BootstrapError(f"{title}: cannot start {arguments[0]}: {error.strerror}") from None
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                display.tick(_last_line(log))
        finally:
            if process.poll() is None:  # Ctrl-C: what was started here does not outlive us
                process.kill()
                process.wait()
    if process.returncode != 0:
        display.end("FAILED")
        raise BootstrapError(f"{title} failed (exit code {process.returncode}): {_last_line(log)} -- log: {log}")
    display.end("done")


# -- places and locks -------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Return where models, downloads, logs and locks are kept: ``OV_PHI3_CACHE``, or the user's cache folder."""
    if configured := os.environ.get("OV_PHI3_CACHE"):
        return Path(configured).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ov-phi3"


def _try_lock(handle: int) -> bool:
    """Lock an open file for this process alone, without waiting."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time build ``name``. The lock ends with its process: it is never stale."""
    path = cache_dir() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(handle):
            display = Display(f"waiting for another process that builds {name}")
            while not _try_lock(handle):
                time.sleep(POLL_S)
                display.tick()
            display.end("free")
        yield
    finally:
        os.close(handle)


def digest(*parts: str | bytes | Path) -> str:
    """Hash texts and the contents of files, each with its length, so that no two lists of parts look alike."""
    total = hashlib.sha256()
    for part in parts:
        # Text files, mostly: a checkout with Windows line ends is the same input.
        content = part.read_bytes().replace(b"\r\n", b"\n") if isinstance(part, Path) else part
        content = content.encode() if isinstance(content, str) else content
        total.update(f"{len(content)}:".encode() + content)
    return total.hexdigest()


# -- environments -----------------------------------------------------------------------------------------------------


def venv_python(venv: Path) -> Path:
    """Return the interpreter of an environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def venv_command(venv: Path, name: str) -> Path:
    """Return a command that is installed in an environment."""
    return venv_python(venv).with_name(f"{name}.exe" if os.name == "nt" else name)


@dataclass(frozen=True)
class Locked:
    """A package of the lock: one version of it, for the machines that the marker is true on."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


_LOCKED = re.compile(
    r"(?P<name>[a-z0-9]+(-[a-z0-9]+)*)==(?P<version>[A-Za-z0-9.!+]+)( ; (?P<marker>[^#\\]+?))?"
    r"(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)


def read_lock(path: Path) -> list[Locked]:
    """Return the packages of a lock; a package may be there more than once, with markers that exclude each other.

    Raises:
        BootstrapError: A line is anything but one version of a package with its hashes.
    """
    text = re.sub(r"\s*\\\r?\n\s*", " ", path.read_text(encoding="utf-8"))
    packages = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _LOCKED.fullmatch(line.strip())
        if match is None:
            raise BootstrapError(f"{path.name}: not one version of a package with its hashes: {line[:100]!r}")
        hashes = tuple(re.findall(r"sha256:([0-9a-f]{64})", match["hashes"]))
        packages.append(Locked(match["name"], match["version"], match["marker"] or "", hashes))
    return packages


def environment_stamp(
    venv: Path, requirements: Sequence[str], *, library: bool = True, lock_file: Path | None = None
) -> str:
    """Return what an environment was made from: a change of any of it means making it again.

    The place is part of it, since an environment cannot be moved; the library's code is not, since it is installed
    editable.
    """
    files = [REQUIREMENTS / f"{name}.txt" for name in requirements]
    if lock_file is not None:
        files.append(lock_file)
    checkout: tuple[str | Path, ...] = (str(ROOT), ROOT / "pyproject.toml") if library else ()
    return digest(str(venv), *checkout, sys.version, sys.base_prefix, *requirements, *files)


def _starts(venv: Path, modules: str = "ov_phi3, pip") -> bool:
    """Tell whether the interpreter of an environment still runs; it does not once the Python that it was made from is
    gone.
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


def is_current(venv: Path, stamp: str, works: Callable[[Path], bool] = _starts) -> bool:
    """Tell whether an environment was finished, from the same inputs, and still works."""
    try:
        found = (venv / STAMP).read_text(encoding="utf-8")
    except OSError:
        return False
    return found == stamp and works(venv)


def clear_environment(venv: Path) -> None:
    """Remove an environment that was made here, and nothing else."""
    if not venv.exists():
        return
    if not (venv / MARKER).exists() and any(venv.iterdir()):
        raise BootstrapError(
            f"{venv} exists and was not made by this script: move it away, or pass --venv with another place"
        )
    # The stamp goes first: a removal that is cut short leaves nothing that looks finished. The marker goes last, so
    # that the next run may go on with it.
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
            f"cannot remove the old environment {venv}: {error}; is something in it still running?"
        ) from None


def install_commands(
    python: Path, requirements: Sequence[str], *, library: bool = True, lock_file: Path | None = None
) -> list[tuple[str, list[str | Path]]]:
    """Return the pip calls that fill an environment, in their order; the requirement files say why."""
    pip: list[str | Path] = [python, "-m", "pip", "install", "--progress-bar", "off"]
    if lock_file is not None:
        return _locked_commands(pip, requirements, library, lock_file)
    torch = REQUIREMENTS / "torch.txt"
    exporter = "export" in requirements
    commands: list[tuple[str, list[str | Path]]] = []
    if exporter:
        commands.append(("install torch", [*pip, "-r", torch]))
    named: list[str | Path] = [part for name in requirements for part in ("-r", REQUIREMENTS / f"{name}.txt")]
    constraint: list[str | Path] = ["-c", torch] if exporter else []
    ours: list[str | Path] = ["-e", ROOT] if library else []
    title = f"install {'ov-phi3 and ' if library else ''}{', '.join(requirements)} packages"
    commands.append((title, [*pip, *ours, *named, *constraint]))
    if exporter:
        commands.append(("install the exporter", [*pip, "--no-deps", "-r", REQUIREMENTS / "export-no-deps.txt"]))
    return commands


def _locked_commands(
    pip: list[str | Path], requirements: Sequence[str], library: bool, lock_file: Path
) -> list[tuple[str, list[str | Path]]]:
    """Return the pip calls that fill an environment from a lock."""
    # Wheels only: building a source distribution runs its code, and fetches what it is built with past the lock.
    exact: list[str | Path] = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    commands = [(f"install the packages of {lock_file.name}", [*pip, *exact, "-r", lock_file])]
    # After the lock, so that pip finds what torch needs in place already, in the locked versions.
    commands += [(f"install {name}", [*pip, "-r", REQUIREMENTS / f"{name}.txt"]) for name in requirements]
    if library:
        # Built with the backend that the lock put there, so nothing is left to fetch.
        ours: list[str | Path] = ["--no-deps", "--no-index", "--no-build-isolation", "-e", ROOT]
        commands.append(("install ov-phi3", [*pip, *ours]))
    return commands


def ensure_test_environment(venv: Path) -> Path:
    """Make the environment of the tests from the lock, or reuse it; return its interpreter."""
    return ensure_environment(venv, ["torch"], lock_file=LOCK)


def ensure_environment(
    venv: Path,
    requirements: Sequence[str],
    *,
    library: bool = True,
    variables: Mapping[str, str] | None = None,
    lock_file: Path | None = None,
) -> Path:
    """Make an environment with the named requirement files and, unless told otherwise, the library (editable), or reuse
    it; return its interpreter. ``variables`` are for the builds of packages that come as source only. With a
    ``lock_file``, its packages go in first, checked against its hashes, and the requirement files are for the rest.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - the one place that an older Python may reach
        raise BootstrapError(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}")
    venv = venv.absolute()
    names = [*requirements, *(("torch", "export-no-deps") if "export" in requirements else ())]
    stamp = environment_stamp(venv, names, library=library, lock_file=lock_file)

    def works(place: Path) -> bool:
        return _starts(place) if library else _starts(place, "pip")

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


def new_log(name: str) -> Path:
    """Return an empty log file."""
    log = cache_dir() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    return log


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """How a model is made: by a builder script (``recipe`` is None), or exported from what that makes."""

    base: str
    recipe: str | None

    @property
    def builder(self) -> Path:
        """The script that makes the model in Hugging Face format."""
        return MODELS / ("demo.py" if self.base == "demo" else "tiny_phi3.py")

    @property
    def options(self) -> list[str]:
        """What the builder is told to make, besides the place."""
        options = {**MINI, "layers": int(self.base[4:])} if _is_mini(self.base) else TINY.get(self.base)
        return ["--options", json.dumps(options)] if options else []

    def inputs(self) -> list[Path]:
        """Return the files that decide what the model is."""
        files = [self.builder, MODELS / "model_files.py", MODELS / "fetch.py", MODELS / "sources.txt"]
        if self.base == "demo":
            files.append(MODELS / "demo_rows.npy")
        if self.recipe is not None:
            library = ROOT / "src" / "ov_phi3"
            files += [*sorted(library.glob("export*.py")), *sorted((library / "_export").glob("*.py"))]
        return files


def _is_mini(base: str) -> bool:
    """Tell whether a base is a full-width Phi-3-mini of some number of layers."""
    return re.fullmatch(r"mini[1-9]\d{0,2}", base) is not None


def parse_model(name: str) -> Model:
    """Read a model's name: a base with ``-hf``, or with a recipe, as in ``demo-int4``."""
    base, _, kind = name.partition("-")
    if (base not in ("demo", *TINY) and not _is_mini(base)) or kind not in ("hf", *RECIPES):
        raise BootstrapError(
            f"unknown model {name!r}: one of {', '.join(BASES)}, then -hf or one of "
            f"{', '.join('-' + r for r in RECIPES)}"
        )
    return Model(base, None if kind == "hf" else kind)


def exporter_versions(python: Path) -> str:
    """Return the versions of the packages that make an export, as JSON; ``null`` for one that is not installed."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "def v(n):\n"
        "    try: return m.version(n)\n"
        "    except m.PackageNotFoundError: return None\n"
        "print(json.dumps({n: v(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [python, "-c", code, *EXPORTER], capture_output=True, text=True, check=False, env=child_environment()
    )
    if done.returncode != 0:
        raise BootstrapError(f"{python} does not run: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip()


def model_key(model: Model, versions: str) -> str:
    """Return the key of a model: equal inputs, equal key."""
    used = versions if model.recipe is not None else "hf"
    return digest(model.base, *model.options, model.recipe or "hf", used, *model.inputs())[:16]


def model_command(python: Path, model: Model, source: Path | None, out: Path) -> list[str | Path]:
    """Return the command that makes a model at ``out``."""
    if source is None:
        return [python, model.builder, out, "--downloads", cache_dir() / "downloads", *model.options]
    return [python, "-m", "ov_phi3", "export", source, out, "--recipe", str(model.recipe)]


def ensure_model(name: str, python: Path | None = None) -> Path:
    """Return the directory of a model in the cache, making it first if it is not there; ``python`` has what an export
    needs.
    """
    model = parse_model(name)
    python = python or Path(sys.executable)
    home = cache_dir() / "models"
    key = model_key(model, exporter_versions(python))
    final = home / key / name  # the last part is the plain name, since that is what people get to see
    with lock(f"model-{name}"):
        if not final.is_dir():
            source = None if model.recipe is None else ensure_model(f"{model.base}-hf", python)
            build_whole(name, final, lambda out: model_command(python, model, source, out))
            remove_unused(home, name, keep=final)
        os.utime(final)
    return final


def build_whole(name: str, final: Path, command: Callable[[Path], Sequence[str | Path]]) -> None:
    """Run the command that makes a model into a temporary place, and put it in its own only when it is done.

    Called with the lock held, so that what an earlier, killed build left may be removed.
    """
    home = final.parent.parent
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(f".building-{name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=f".building-{name}-", ignore_cleanup_errors=True) as folder:
        out = Path(folder) / name
        verb = "build" if name.endswith("-hf") else "export"
        run_step(f"{verb} the model {name}", command(out), new_log(f"model-{name}"))
        if not out.is_dir():
            raise BootstrapError(f"making {name} left no directory {out}")
        final.parent.mkdir(exist_ok=True)
        out.replace(final)


def remove_unused(home: Path, name: str, keep: Path) -> None:
    """Remove models of this name that were made from other inputs and have not been asked for in a month."""
    for old in home.glob(f"*/{name}"):
        if old != keep and not old.parent.name.startswith(".") and time.time() - old.stat().st_mtime > UNUSED_S:
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(OSError):
                old.parent.rmdir()


# -- the frame of a script --------------------------------------------------------------------------------------------


def main_of(function: Callable[[], int]) -> None:
    """Run a script's main function; a failure is one line on stderr, not a traceback."""
    try:
        code = function()
    except BootstrapError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    # For people and tools that need a model and nothing else: print the directory of each model that is named.
    main_of(lambda: print(*(json.dumps(str(ensure_model(name))) for name in sys.argv[1:]), sep="\n") or 0)
