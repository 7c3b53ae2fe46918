"""Models for tests and benchmarks, built on first use and cached.

    python scripts/_models.py NAME ...    # make the models and print their directories as JSON strings

A name is a base (``demo``, ``tiny``, ...) and ``-hf`` (Hugging Face format), a recipe of the export, as in
``demo-int4``, or, for random models, a type of GGUF file, as in ``mini32-q4_0``. A model is either complete or absent:
its directory is built elsewhere and then renamed.
"""

from __future__ import annotations

import contextlib
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

from _paths import MODELS, REQUIREMENTS, ROOT, cache_dir, digest, new_log
from _process_lock import lock
from _steps import BootstrapError, child_environment, main_of, run_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "BASES",
    "GGUF_TYPES",
    "RECIPES",
    "Model",
    "build_whole",
    "ensure_built",
    "ensure_model",
    "exporter_versions",
    "model_command",
    "model_key",
    "parse_model",
]

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
UNUSED_S = 30 * 24 * 3600.0


def _longrope(boundary: int, context: int) -> dict[str, object]:
    """Return the options of a tiny LongRoPE model. The factors differ widely, so a wrong one changes the next token."""
    factors = {"short_factor": [1 + i / 50 for i in range(8)], "long_factor": [1.5 + i * 3 / 8 for i in range(8)]}
    return {
        "seed": boundary,
        "max_position_embeddings": context,
        "original_max_position_embeddings": boundary,
        "rope_scaling": {"type": "longrope", **factors},
    }


# Options of scripts/models/tiny_phi3.py; the window of "sliding" is that of Phi-3-mini-4k.
TINY: dict[str, dict[str, object]] = {
    "tiny": {},
    "longrope64": _longrope(64, 1024),
    "longrope256": {**_longrope(256, 2048), "kv_heads": 2},
    "sliding": {"seed": 3, "sliding_window": 2047},
}
# The sizes of Phi-3-mini-4k; the name gives the number of layers: "mini32" is as large as the real model.
MINI: dict[str, object] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "heads": 32,
    "sliding_window": 2047,
    "dtype": "float16",
}
BASES = ("demo", *TINY, "mini<layers>")
RECIPES = ("int4", "int4-max", "int4-calibrated", "int8", "fp16", "fp32")
# GGUF files, written by scripts/models/phi3_gguf.py in the environment of llama.cpp (benchmarks/_peers.py).
GGUF_TYPES = ("q4_0", "q4_k_m")


@dataclass(frozen=True)
class Model:
    """How to make a model: with a builder script (``recipe`` is None), or from the builder's result.

    The latter is exported with a recipe, or written as a GGUF file of the type that ``recipe`` names.
    """

    base: str
    recipe: str | None

    @property
    def builder(self) -> Path:
        """The script that makes the model in Hugging Face format."""
        return MODELS / ("demo.py" if self.base == "demo" else "tiny_phi3.py")

    @property
    def options(self) -> list[str]:
        """Arguments of the builder besides the output path."""
        options = {**MINI, "layers": int(self.base[4:])} if _is_mini(self.base) else TINY.get(self.base)
        return ["--options", json.dumps(options)] if options else []

    def inputs(self) -> list[Path]:
        """Return the files that determine the model."""
        files = [self.builder, MODELS / "model_files.py", MODELS / "fetch.py", MODELS / "sources.txt"]
        if self.base == "demo":
            files.append(MODELS / "demo_rows.npy")
        if self.recipe in GGUF_TYPES:
            files += [MODELS / "phi3_gguf.py", REQUIREMENTS / "peer-llama-cpp.txt"]
        elif self.recipe is not None:
            files += sorted((ROOT / "src" / "ov_phi3" / "exporting").glob("*.py"))
        return files


def _is_mini(base: str) -> bool:
    """Return whether a base is a full-width Phi-3-mini with some number of layers."""
    return re.fullmatch(r"mini[1-9]\d{0,2}", base) is not None


def parse_model(name: str) -> Model:
    """Read the name of a model: a base with ``-hf`` or with a recipe, as in ``demo-int4``.

    Raises:
        BootstrapError: There is no such model.
    """
    base, _, kind = name.partition("-")
    kinds = ("hf", *RECIPES, *(GGUF_TYPES if base == "tiny" or _is_mini(base) else ()))
    if (base not in ("demo", *TINY) and not _is_mini(base)) or kind not in kinds:
        raise BootstrapError(
            f"unknown model {name!r}: expected one of {', '.join(BASES)}, then -hf or one of "
            f"{', '.join('-' + r for r in (*RECIPES, *GGUF_TYPES))} (the last {len(GGUF_TYPES)} for random models only)"
        )
    return Model(base, None if kind == "hf" else kind)


def exporter_versions(python: Path) -> str:
    """Return the versions of the packages that an export uses, as JSON; ``null`` for an absent package."""
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
    """Return a hash of the inputs of a model; ``versions`` is that of `exporter_versions`."""
    used = versions if model.recipe in RECIPES else "hf"
    return digest(model.base, *model.options, model.recipe or "hf", used, *model.inputs())[:16]


def model_command(python: Path, model: Model, source: Path | None, out: Path) -> list[str | Path]:
    """Return the command that makes a model at ``out``."""
    if source is None:
        return [python, model.builder, out, "--downloads", cache_dir() / "downloads", *model.options]
    if model.recipe in GGUF_TYPES:
        downloads = ["--downloads", cache_dir() / "downloads"]
        return [python, MODELS / "phi3_gguf.py", source, out, "--type", model.recipe, *downloads]
    return [python, "-m", "ov_phi3", "export", source, out, "--recipe", str(model.recipe)]


def ensure_model(name: str, python: Path | None = None) -> Path:
    """Return the directory of a model in the cache; make the model first if it is absent.

    Args:
        name: As for `parse_model`.
        python: Interpreter with the packages that an export needs, or those of ``phi3_gguf.py``; None for this one.

    Raises:
        BootstrapError: There is no such model, or it cannot be made.
    """
    model = parse_model(name)
    python = python or Path(sys.executable)

    def command(out: Path) -> Sequence[str | Path]:
        source = None if model.recipe is None else ensure_model(f"{model.base}-hf", python)
        return model_command(python, model, source, out)

    return ensure_built(name, model_key(model, exporter_versions(python)), command)


def ensure_built(name: str, key: str, command: Callable[[Path], Sequence[str | Path]]) -> Path:
    """Return the directory with this name and this hash of its inputs in the cache; make it first if it is absent.

    Args:
        name: The name of the directory.
        key: Hash of all inputs.
        command: Given the path to write, it returns the command that makes the directory.

    Raises:
        BootstrapError: The command failed.
    """
    home = cache_dir() / "models"
    final = home / key / name  # the plain name comes last, as people see it
    with lock(f"model-{name}"):
        if not final.is_dir():
            build_whole(name, final, command)
            _remove_unused(home, name, keep=final)
        os.utime(final)
    return final


def build_whole(name: str, final: Path, command: Callable[[Path], Sequence[str | Path]]) -> None:
    """Run the command that makes a model in a temporary folder, and move the result to ``final`` when it is complete.

    The caller holds the lock of the model, so the leftovers of an earlier, killed build are removed.
    """
    home = final.parent.parent
    home.mkdir(parents=True, exist_ok=True)
    for leftover in home.glob(f".building-{name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=f".building-{name}-", ignore_cleanup_errors=True) as folder:
        out = Path(folder) / name
        verb = "build" if name.endswith(("-hf", *GGUF_TYPES)) else "export"
        # The list of the user's models does not get the models of the tests.
        run_step(
            f"{verb} the model {name}", command(out), new_log(f"model-{name}"), variables={"OV_PHI3_STATE": folder}
        )
        if not out.is_dir():
            raise BootstrapError(f"making {name} left no directory {out}")
        final.parent.mkdir(exist_ok=True)
        out.replace(final)


def _remove_unused(home: Path, name: str, keep: Path) -> None:
    """Remove models of this name that were made from other inputs and were not used for a month."""
    for old in home.glob(f"*/{name}"):
        if old != keep and not old.parent.name.startswith(".") and time.time() - old.stat().st_mtime > UNUSED_S:
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(OSError):
                old.parent.rmdir()


def main() -> int:
    """Print the directory of each model named on the command line."""
    print(*(json.dumps(str(ensure_model(name))) for name in sys.argv[1:]), sep="\n")
    return 0


if __name__ == "__main__":
    main_of(main)
