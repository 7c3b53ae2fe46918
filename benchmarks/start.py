"""From the start of a process to its first token, part by part, each start in a process of its own.

    python benchmarks/start.py [MODEL] [--backend NAME ...] [--against SRC] [--cold] [--starts N] [--json FILE]

The processes alternate between the backends and, with `--against`, between this library and the one in the folder SRC,
such as `src` of another checkout. `--cold` drops the model's files from the page cache before each start; otherwise one
start that does not count reads them. The clock starts before the interpreter does. The last row is the CPU time, user
and system, until the first token. Without MODEL, the demo model is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _environment import demo_model, run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import Refused, add_model_arguments, check, exit_with, measured_device, progress, write_json
from ov_phi3.bench.table import table

BACKENDS = ("llm_pipeline", "infer_request")
PARTS = {
    "interpreter": "interpreter",
    "imports": "imports",
    "load": "load",
    "model": "  of it, read and compile the model",
    "tokenizer": "  of it, open the tokenizer, beside the model",
    "first": "first token",
    "total": "start to first token",
    "later": "first token of a later request of the same length",
    "cpu": "CPU time until the first token",
}

START = """
import sys, time
began = time.time()
import json, resource
import ov_phi3
from ov_phi3.system.core import import_genai, import_openvino
ov_phi3.load
import_genai() if sys.argv[3] == "llm_pipeline" else import_openvino()
imported = time.time()
pipe = ov_phi3.load(sys.argv[1], sys.argv[2], backend=sys.argv[3])
loaded = time.time()
config = {"max_new_tokens": 1, "ignore_eos": True, "do_sample": False}
pipe.generate("Tell me how bread is made.", **config)
first = time.time()
usage = resource.getrusage(resource.RUSAGE_SELF)
cpu = usage.ru_utime + usage.ru_stime
again = time.time()
pipe.generate("Why does it rain at times?", **config)
seconds = {"interpreter": began - float(sys.argv[4]), "imports": imported - began, "load": loaded - imported,
           "first": first - loaded, "total": first - float(sys.argv[4]), "later": time.time() - again, "cpu": cpu}
report = pipe.load_report
print(json.dumps({**{part: 1e3 * value for part, value in seconds.items()},
                  "model": report.model_ms, "tokenizer": report.tokenizer_ms}))
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: both")
    parser.add_argument("--against", type=Path, metavar="SRC", help="folder with another version of the library")
    parser.add_argument("--cold", action="store_true", help="drop the model's files from the page cache each time")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="default: %(default)s")
    return parser.parse_args()


def start(options: argparse.Namespace, backend: str, library: Path) -> dict[str, float]:
    """Milliseconds by part of one start."""
    if options.cold:
        drop_from_page_cache(options.model)
    environment = {**os.environ, "PYTHONPATH": str(library)}
    command = [sys.executable, "-c", START, str(options.model), options.device, backend, repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise Refused(f"a start with {backend} and {library} failed: {done.stderr.strip().splitlines()[-1]}")
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return parts


def drop_from_page_cache(folder: Path) -> None:
    """Write a folder's files to the disk and drop them from the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The starts by their kind, in alternation."""
    libraries = {"": Path(ov_phi3.__file__).parents[1]}
    if options.against:
        libraries[" against"] = options.against.resolve()
    samples: dict[str, list[dict[str, float]]] = {}
    for number in range(options.starts + 1):
        for backend in options.backend:
            for name, library in libraries.items():
                progress(f"start {number} of {options.starts}: {backend}{name}")
                parts = start(options, backend, library)
                if number:
                    samples.setdefault(backend + name, []).append(parts)
    return samples


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    check(options, needs_model=False)
    if options.against and not (options.against / "ov_phi3").is_dir():
        raise Refused(f"--against {options.against} has no folder ov_phi3; name the src folder of a checkout.")
    options.model = options.model or demo_model("int4")
    samples = measure(options)
    progress("")
    rows = [("medians, ms", *samples)]
    for part, label in PARTS.items():
        rows.append((label, *(f"{statistics.median(s[part] for s in starts):.0f}" for starts in samples.values())))
    device = measured_device(options)
    print(f"{ov_phi3.Machine.here()}\n{options.model} on {device}, {options.starts} starts each\n\n{table(rows)}")
    if options.json:
        report: dict[str, Any] = {"machine": ov_phi3.Machine.here().to_dict(), "device": asdict(device)}
        write_json(options.json, {**report, "model": str(options.model), "cold": options.cold, "starts": samples})
    return 0


if __name__ == "__main__":
    exit_with(main)
