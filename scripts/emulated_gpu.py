"""Run a command with an emulated GPU.0, on a machine without a GPU: ``python scripts/emulated_gpu.py COMMAND...``

OpenVINO's real GPU plugin runs on Intel's OpenCL runtime for CPUs, through a libOpenCL of our own (``opencl/``) that
presents the CPU as an Intel GPU with "(emulated)" in its name. The emulation shows how the plugin behaves. It says
nothing about the speed, the drivers or the rounding of a real GPU.

pip downloads the runtime and checks it against ``opencl/packages.lock``; the system's C compiler builds our libOpenCL.
Both stay in the cache folder, with the kernels that the runtime has built. The script neither reads nor changes the
system's OpenCL. It needs Linux on x86-64. Four environment variables configure the emulation:

- ``OV_PHI3_EMULATED_GPUS``: ``integrated`` (the default), ``discrete`` or ``integrated,discrete``
- ``OV_PHI3_EMULATED_MEMORY``: a file that gets a line for each allocation, with its kind and its bytes
- ``OV_PHI3_EMULATED_LOG``: any value prints the compiler's messages about kernels that do not build
- ``OV_PHI3_EMULATED_KERNELS``: the folder of built kernels; this script sets it
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from _environments import ensure_test_environment
from _models import UNUSED_S, exporter_versions
from _paths import ROOT, cache_dir, digest, new_log
from _process_lock import lock
from _steps import BootstrapError, child_environment, main_of, run_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SOURCES = ROOT / "scripts" / "opencl"
PACKAGES = SOURCES / "packages.lock"
COMPILERS = ("cc", "gcc", "clang")
# Files that are needed: the libraries, under the names by which they are loaded, and the runtime's data.
NEEDED = re.compile(
    r"libintelocl\.so|libcommon_clang\.so(\.\d+){4}|libocl_svml_\w+\.so|libimf\.so|libsvml\.so|libirng\.so"
    r"|libintlc\.so\.5|libtbb\.so\.12|cl\.cfg|\w+\.rtl|cllibrary\w+\.o"
)


class UnavailableError(BootstrapError):
    """This machine does not have what the emulation needs. The message says what is missing."""


def home() -> Path:
    """Return the folder of the emulation in the cache."""
    return cache_dir() / "emulated-gpu"


def check_machine() -> None:
    """Raise UnavailableError on platforms that Intel's runtime does not support."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}")


def find_compiler() -> str:
    """Return the first C compiler on PATH that builds a shared library; without the C library's headers, none does."""
    check = '#include <stdio.h>\nint check(void) { return puts(""); }\n'
    with tempfile.TemporaryDirectory(prefix="ov-phi3-cc-") as folder:
        for name in COMPILERS:
            command = [name, "-shared", "-fPIC", "-x", "c", "-", "-o", str(Path(folder) / "check.so")]
            with contextlib.suppress(OSError):
                done = subprocess.run(command, input=check, text=True, capture_output=True, check=False)
                if done.returncode == 0:
                    return name
    raise UnavailableError(f"needs a C compiler, and none of {', '.join(COMPILERS)} works here")


# -- parts ------------------------------------------------------------------------------------------------------------


def ensure_part(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of a part; ``make`` fills a new one, which is whole or absent. The caller holds the lock."""
    final = home() / f"{name}-{key[:16]}"
    if not final.is_dir():
        home().mkdir(parents=True, exist_ok=True)
        for left in home().glob(f".making-{name}-*"):  # left by a killed run
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=home(), prefix=f".making-{name}-", ignore_cleanup_errors=True) as folder:
            out = Path(folder) / name
            out.mkdir()
            make(out)
            out.replace(final)
    os.utime(final)
    return final


def remove_unused(keep: Iterable[Path]) -> None:
    """Remove parts that were made from other inputs and not used for a month."""
    kept = set(keep)
    for old in home().iterdir():
        if old not in kept and time.time() - old.stat().st_mtime > UNUSED_S:
            shutil.rmtree(old, ignore_errors=True)


def fetch_runtime(python: Path, out: Path) -> None:
    """Download the locked packages and unpack the needed files into ``out/lib``.

    Raises:
        UnavailableError: pip cannot download the packages.
        BootstrapError: A downloaded file does not have the locked hash.
    """
    log = new_log("emulated-gpu-packages")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="wheels-") as folder:
        exact: list[str | Path] = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", PACKAGES]
        patience = ["--progress-bar", "off", "--retries", "2", "--timeout", "30"]
        command = [python, "-m", "pip", "download", *patience, *exact, "--dest", folder]
        try:
            run_step("download the OpenCL runtime for CPUs (270 MB)", command, log)
        except BootstrapError as error:
            if "DO NOT MATCH THE HASHES" in log.read_text(encoding="utf-8", errors="replace"):
                raise
            raise UnavailableError(f"pip cannot download the packages of {PACKAGES.name}: {error}") from None
        for wheel in sorted(Path(folder).glob("*.whl")):
            unpack(wheel, out / "lib")


def unpack(wheel: Path, out: Path) -> None:
    """Unpack the needed files of a wheel into one folder."""
    out.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            path = PurePosixPath(member)
            if path.parent.name == "lib" and NEEDED.fullmatch(path.name):
                with archive.open(member) as source, (out / path.name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)


def source_files() -> list[Path]:
    """Return the source files of libOpenCL."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h", ".cl", ".map"))


def layer_command(compiler: str, runtime: str, out: Path) -> list[str | Path]:
    """Return the command that builds libOpenCL; ``runtime`` is the folder of the runtime, beside that of libOpenCL."""
    sources = [path.name for path in source_files() if path.suffix == ".c"]
    dialect = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
    link = ["-soname,libOpenCL.so.1", "--version-script=versions.map", f"-rpath,$ORIGIN/../{runtime}/lib", "-z,defs"]
    return [compiler, *dialect, *sources, *(f"-Wl,{option}" for option in link), "-ldl", "-lpthread", "-o", out]


# -- environment ------------------------------------------------------------------------------------------------------


def processor() -> str:
    """Describe the processor; kernels are machine code for one kind of processor."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return "\n".join(sorted(set(re.findall(r"(?m)^(?:cpu family|model|flags)\s*:.*$", text))))
    return platform.processor()


def ensure_emulated_gpu(python: Path) -> dict[str, str]:
    """Prepare the emulation, or reuse it; return the environment variables that enable it in a child process.

    Args:
        python: An interpreter with pip and OpenVINO.

    Raises:
        UnavailableError: This machine does not have what the emulation needs.
        BootstrapError: The emulation is broken.
    """
    check_machine()
    compiler = find_compiler()
    if re.search("[:;]", str(home())):
        raise UnavailableError(f"needs a cache folder without ':' and ';' in its path, this one is {home()}")
    openvino = str(json.loads(exporter_versions(python))["openvino"])
    with lock("emulated-gpu"):
        runtime = ensure_part("runtime", digest(PACKAGES, NEEDED.pattern), lambda out: fetch_runtime(python, out))

        def build_layer(out: Path) -> None:
            command = layer_command(compiler, runtime.name, out / "libOpenCL.so.1")
            run_step("build the emulated GPU", command, new_log("emulated-gpu-build"), cwd=SOURCES)

        command_text = map(str, layer_command("", runtime.name, Path()))
        layer = ensure_part("layer", digest(*command_text, *source_files()), build_layer)
        # The name of a built kernel's file holds a hash of its whole source and options. The rest is in the key, with
        # the prelude, so that the folder of an old prelude is removed.
        kernels_key = digest(runtime.name, openvino, processor(), SOURCES / "prelude.cl")
        kernels = ensure_part("kernels", kernels_key, lambda _: None)
        remove_unused((runtime, layer, kernels))
    variables = child_variables(runtime / "lib", layer, kernels)
    check_device(python, variables)
    return variables


def child_variables(runtime: Path, layer: Path, kernels: Path) -> dict[str, str]:
    """Return the environment variables with which a child process loads our libOpenCL and finds the built kernels."""
    places = [str(layer), str(runtime), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    # The runtime needs a newer TBB than OpenVINO's wheel has, and a process loads one libtbb.so.12 for both.
    preloaded = ["libtbb.so.12", *filter(None, [os.environ.get("LD_PRELOAD")])]
    return {
        "LD_LIBRARY_PATH": ":".join(places),
        "LD_PRELOAD": ":".join(preloaded),
        "OV_PHI3_EMULATED_KERNELS": str(kernels),
        "OV_PHI3_EMULATED_GPUS": os.environ.get("OV_PHI3_EMULATED_GPUS") or "integrated",
    }


def check_device(python: Path, variables: dict[str, str]) -> None:
    """Raise BootstrapError if OpenVINO does not find the emulated GPU."""
    code = "import openvino; print(openvino.Core().get_property('GPU', 'FULL_DEVICE_NAME'))"
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, env=child_environment() | variables
    )
    if done.returncode != 0 or "(emulated)" not in done.stdout:
        words = next((line for line in done.stderr.splitlines() if line.startswith("emulated GPU:")), "")
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise BootstrapError(f"OpenVINO does not find the emulated GPU: {words or last[0]}")


def main() -> int:
    """Prepare the emulation and run a command in it, with the test environment's folder first on PATH."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    python = ensure_test_environment(ROOT / ".venv-test")
    env = child_environment() | ensure_emulated_gpu(python)
    env["PATH"] = os.pathsep.join([str(python.parent), env.get("PATH", "")])
    command = shutil.which(sys.argv[1], path=env["PATH"])
    if command is None:
        raise BootstrapError(f"there is no command {sys.argv[1]!r}")
    return subprocess.run([command, *sys.argv[2:]], check=False, env=env).returncode


if __name__ == "__main__":
    main_of(main)
