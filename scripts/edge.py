"""The cost of the library on a small machine, compared with raw GenAI and the cookbook's stack.

    python scripts/edge.py [MODEL] [--device CPU] [--repeat 5] [--json FILE]

The script builds a wheel of the library and installs it with its run-time packages only into a new environment; raw
GenAI runs there too. The cookbook's stack (optimum-intel, transformers, torch) runs in the environment of
``scripts/quickstart.py``, of which the packages that the stack needs are counted. The script measures the size of the
wheel and of the installed packages, the import time, the time from the start of the interpreter to the first text, and
memory (the peak, and steady: after the reply with the model still loaded). Every sample is a separate process, and the
stacks alternate in every round. The figures are medians of the rounds.

The exit code is 1 if a limit is exceeded: a wheel of 1 MB, run-time packages of 320 MB, a start of Python with the
import of 1.5 times the start without it, and 1.03 times the memory of raw GenAI.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _environments import ensure_environment, venv_python
from _models import ensure_model
from _paths import ROOT, new_log
from _steps import BootstrapError, child_environment, main_of, run_step

STACKS = {
    "ov_phi3": "ov_phi3",
    "own_loop": "ov_phi3, infer_request",
    "openvino_genai": "raw GenAI",
    "cookbook": "the cookbook's stack",
}
IMPORTS = {
    "python": "pass",
    "ov_phi3": "import ov_phi3",
    "openvino_genai": "import openvino_genai",
    "cookbook": "from optimum.intel import OVModelForCausalLM; from transformers import AutoTokenizer",
}
# The packages that each stack needs; their dependencies follow from their metadata.
ROOTS = {"ov_phi3": ["ov-phi3"], "openvino_genai": ["openvino-genai"], "cookbook": ["optimum-intel", "nncf", "torch"]}
LIMITS = {"wheel_bytes": 1_000_000, "installed_bytes": 320_000_000, "import_ratio": 1.5, "memory_ratio": 1.03}

# Runs in the measured environment, which may have the standard library only.
_SIZES = r"""
import json, os, re, sys
from importlib import metadata
def key(name): return re.sub(r"[-_.]+", "-", name).lower()
sizes, pending = {}, [key(name) for name in sys.argv[1:]]
while pending:
    name = pending.pop()
    if name in sizes: continue
    try: dist = metadata.distribution(name)
    except metadata.PackageNotFoundError: continue
    paths = [dist.locate_file(file) for file in dist.files or []]
    sizes[name] = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
    for line in dist.requires or []:
        if "extra ==" not in line: pending.append(key(re.match(r"[A-Za-z0-9._-]+", line)[0]))
print(json.dumps(sizes))
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="an exported model; default: the demo model")
    parser.add_argument("--device", default="CPU", help="exactly one device (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples to this file")
    parser.add_argument("--without-cookbook", action="store_true", help="do not measure the cookbook's stack")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error(f"--repeat {options.repeat}: expected at least 1")
    return options


def clean_environment(folder: Path) -> tuple[Path, Path]:
    """Build the wheel and install it into a new environment; return its interpreter and the wheel."""
    log = new_log("edge")
    pip = ["-m", "pip", "--disable-pip-version-check"]
    run_step("build the wheel", [sys.executable, *pip, "wheel", "--no-deps", "-w", folder, ROOT], log)
    (wheel,) = folder.glob("*.whl")
    run_step("make a clean environment", [sys.executable, "-m", "venv", folder / "clean"], log)
    python = venv_python(folder / "clean")
    run_step("install the wheel and its run-time packages", [python, *pip, "install", wheel], log)
    return python, wheel


def seconds_to_import(python: Path, statement: str) -> float:
    """Return the time that an interpreter takes to start, import and exit."""
    started = time.perf_counter()
    done = subprocess.run([python, "-c", statement], env=child_environment(), capture_output=True, check=False)
    elapsed = time.perf_counter() - started
    if done.returncode:
        raise BootstrapError(f"{statement!r} failed: {_last_line(done.stderr)}")
    return elapsed


def reply(python: Path, stack: str, model: Path, device: str) -> dict[str, Any]:
    """Run a stack's reply in a new process; return seconds to the first text, tokens and memory."""
    command = [python, Path(__file__).with_name("edge_stacks.py"), stack, model, device]
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", env=child_environment()
        )
        assert process.stdout is not None
        first, lines = None, []
        for line in process.stdout:
            first = first or (time.perf_counter() - started if line == "first\n" else None)
            lines.append(line)
        if process.wait() or first is None:
            errors.seek(0)
            raise BootstrapError(f"{STACKS[stack]} did not answer: {_last_line(errors.read())}")
    return {"first_text_s": first, **json.loads(lines[-1])}


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def sizes(python: Path, roots: list[str]) -> dict[str, int]:
    """Return the sizes in bytes of these packages and of all their dependencies, by name."""
    done = subprocess.run([python, "-c", _SIZES, *roots], env=child_environment(), capture_output=True, check=True)
    result: dict[str, int] = json.loads(done.stdout)
    return result


def measure(pythons: dict[str, Path], model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all stacks, alternating in every round; return the samples."""
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS if name == "python" or name in pythons}
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for number in range(-1, options.repeat):
        print(f"- round {number + 1} of {options.repeat}" + (", warm-up" if number < 0 else ""), flush=True)
        for name in imports:
            # A start is short, and other processes disturb it: several samples per round.
            times = [seconds_to_import(pythons.get(name, pythons["ov_phi3"]), IMPORTS[name]) for _ in range(4)]
            imports[name] += times if number >= 0 else []
        for name, python in pythons.items():
            sample = reply(python, name, model, options.device)
            replies[name] += [sample] if number >= 0 else []
    return {"import_s": imports, "replies": replies}


def summary(samples: dict[str, Any], installed: dict[str, dict[str, int]], wheel: Path) -> dict[str, Any]:
    """Return the figures of each stack, and the figures that have a limit."""
    starts = {name: statistics.median(times) for name, times in samples["import_s"].items()}
    stacks: dict[str, dict[str, Any]] = {}
    for name, replies in samples["replies"].items():
        kind = "ov_phi3" if name == "own_loop" else name
        memory = [sample["memory"] for sample in replies if sample["memory"]]
        stacks[name] = {
            "installed_bytes": sum(installed[kind].values()),
            "import_ms": (starts[kind] - starts["python"]) * 1000,
            "first_text_s": statistics.median(sample["first_text_s"] for sample in replies),
            "peak_bytes": statistics.median(one["peak"] for one in memory) if memory else None,
            "steady_bytes": statistics.median(one["steady"] for one in memory) if memory else None,
        }
    ours, raw = stacks["ov_phi3"]["peak_bytes"], stacks["openvino_genai"]["peak_bytes"]
    limited = {
        "wheel_bytes": wheel.stat().st_size,
        "installed_bytes": stacks["ov_phi3"]["installed_bytes"],
        "import_ratio": starts["ov_phi3"] / starts["python"],
        "memory_ratio": ours / raw if ours and raw else None,
    }
    return {"python_start_ms": starts["python"] * 1000, "stacks": stacks, "limited": limited}


def show(figures: dict[str, Any]) -> None:
    """Print the table and the figures that have a limit."""
    print(f"\n{'':<24}{'installed':>11}{'import':>11}{'first text':>12}{'peak':>11}{'steady':>11}")
    for name, row in figures["stacks"].items():
        memory = [row["peak_bytes"], row["steady_bytes"]]
        mib = "".join(f"{value / 2**20:>7.0f} MiB" if value else f"{'-':>11}" for value in memory)
        times = f"{row['import_ms']:>8.0f} ms{row['first_text_s']:>10.2f} s"
        print(f"{STACKS[name]:<24}{row['installed_bytes'] / 1e6:>8.0f} MB{times}{mib}")
    print(
        f"\nPython alone starts and exits in {figures['python_start_ms']:.0f} ms; an import is the time on top of that."
    )
    units = {"wheel_bytes": (1e3, "kB"), "installed_bytes": (1e6, "MB")}
    for name, most in LIMITS.items():
        value = figures["limited"][name]
        scale, unit = units.get(name, (1, ""))
        shown = "not measured here" if value is None else f"{value / scale:.4g} {unit}".strip()
        verdict = "" if value is None or value <= most else "  EXCEEDED"
        print(f"{name.replace('_', ' '):<18}{shown:>18}  (at most {most / scale:g} {unit}".rstrip() + f"){verdict}")


def main() -> int:
    """Measure and print; the exit code is 1 if a limit is exceeded."""
    options = parse_arguments()
    exporter = ensure_environment(ROOT / ".venv", ["export"])
    model = options.model or ensure_model("demo-int4", exporter)
    with tempfile.TemporaryDirectory() as folder:
        python, wheel = clean_environment(Path(folder))
        pythons = {"ov_phi3": python, "own_loop": python, "openvino_genai": python}
        if not options.without_cookbook:
            pythons["cookbook"] = exporter
        installed = {name: sizes(pythons[name], roots) for name, roots in ROOTS.items() if name in pythons}
        samples = measure(pythons, model.absolute(), options)
        figures = summary(samples, installed, wheel)
    show(figures)
    if options.json:
        settings = {"model": model.name, "device": options.device, "rounds": options.repeat}
        report = {**settings, **figures, "packages": installed, "samples": samples}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(v is not None and v > LIMITS[name] for name, v in figures["limited"].items()))


if __name__ == "__main__":
    main_of(main)
