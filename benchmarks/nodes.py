"""Where the device's time goes in a pass of one token: milliseconds by kind of node, and GB/s of each matrix product.

    python benchmarks/nodes.py [MODEL] [--device CPU] [--rows 1 2] [--ov-config KEY=VALUE] [--kernels] [--json FILE]

The model is loaded on `backend="infer_request"` with OpenVINO's counters on (`PERF_COUNT`). Passes of some tokens of
one sequence run behind 160 others, as in a reply, and the counters give the time of each node. The bytes of a matrix
product are those of its weights, with scales and zero points, in the model's file; a pass reads each of them once.
`--kernels` also prints the kernel of each product and the layout of its weights, as oneDNN reports them when it
makes one (`ONEDNN_VERBOSE=profile_create`); its report of every execution is no use here, since with it the CPU plugin
fails ("could not execute a primitive", OpenVINO 2026.4.1). Without MODEL, the demo model is used.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import (
    add_load_arguments,
    add_model_arguments,
    check_or_demo,
    exit_with,
    load_options,
    measured_device,
    write_json,
)
from ov_phi3.backends.paged.model_runner import ModelRunner
from ov_phi3.bench.table import table
from ov_phi3.model.ir import IrGraph
from ov_phi3.system.bandwidth import bandwidth

PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
_WARM = 3
_SMALLEST = 1024  # bytes; smaller constants are no weights


@dataclass(frozen=True)
class Part:
    """Nodes of one kind.

    Attributes:
        name: a matrix product and the type of its weights, or the type of a node.
        kernel: OpenVINO's name of the implementation.
        nodes: number of nodes.
        ms: their time in a pass, milliseconds.
        weight_bytes: bytes of weights that they read.
    """

    name: str
    kernel: str
    nodes: int
    ms: float
    weight_bytes: int

    @property
    def bytes_per_s(self) -> float:
        """Bytes of weights read per second; 0 for nodes without weights."""
        return self.weight_bytes / self.ms * 1e3 if self.ms else 0.0


@dataclass(frozen=True)
class Pass:
    """Passes of a number of tokens: the median time of one, milliseconds, and its parts."""

    rows: int
    ms: float
    parts: list[Part]

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready values."""
        parts = [{**asdict(part), "bytes_per_s": part.bytes_per_s} for part in self.parts]
        return {"rows": self.rows, "ms": self.ms, "parts": parts}


def weights(xml: Path) -> dict[str, tuple[str, int]]:
    """Type of the weights and bytes of all constants, for each matrix product of a model by its name."""
    graph = IrGraph.read(xml)
    types: dict[str, tuple[str, int]] = {}
    for constant in graph.layers("Const"):
        if (data := constant.constant) is None or data.size < _SMALLEST:
            continue
        for product in _products(constant.id, graph):
            type_, size = types.get(product, ("", 0))
            largest = len(data.shape) > 1 and data.size > size
            types[product] = (data.element_type if largest else type_, size + data.size)
    return types


def _products(constant: str, graph: IrGraph) -> Iterator[str]:
    """Names of the matrix products that read a constant, directly or decompressed."""
    for edge in graph.edges_from(constant):
        reader = graph.layer(edge.reader)
        if reader.type == "MatMul":
            yield reader.name
        elif reader.type in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
            yield from _products(reader.id, graph)


class Counters:
    """The counters of the model that a pipeline runs, and the passes that they have seen.

    OpenVINO reports the average of a node over all passes since the model was compiled. The first ones are slow, so a
    measurement is the difference of two sums.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.runner: Any = None
        run, time_rows = ModelRunner.run, ModelRunner.time_rows

        def counted(runner: ModelRunner, *args: Any) -> Any:
            self.runner = runner
            self.passes += 1
            return run(runner, *args)

        def timed(runner: ModelRunner, rows: int) -> float:
            self.passes += 1
            return time_rows(runner, rows)

        ModelRunner.run, ModelRunner.time_rows = counted, timed  # type: ignore[method-assign]

    def sums(self) -> dict[tuple[str, str, str], float]:
        """Seconds in all passes so far, by a node's name, type and kernel."""
        return {node: seconds * self.passes for node, seconds in self.runner.node_times().items()}


def measure(options: argparse.Namespace) -> list[Pass]:
    """Measure passes of each number of rows."""
    counters = Counters()
    load = load_options(options)
    load["ov_config"] = {**(load["ov_config"] or {}), "PERF_COUNT": True}
    sizes = weights(options.model / "openvino_model.xml")
    results = []
    with ov_phi3.load(options.model, backend="infer_request", **load) as pipe:
        pipe.generate("Hello", max_new_tokens=2, ignore_eos=True, do_sample=False)
        for rows in options.rows:
            for _ in range(_WARM):
                counters.runner.time_rows(rows)
            before, seen = counters.sums(), counters.passes
            times = [counters.runner.time_rows(rows) for _ in range(options.repeat)]
            nodes = {
                key: (total - before.get(key, 0.0)) / (counters.passes - seen) for key, total in counters.sums().items()
            }
            results.append(Pass(rows, statistics.median(times) * 1e3, parts_of(nodes, sizes)))
    return results


def parts_of(nodes: dict[tuple[str, str, str], float], sizes: dict[str, tuple[str, int]]) -> list[Part]:
    """The nodes by kind, the slowest kind first."""
    kinds: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for (name, type_, kernel), seconds in nodes.items():
        if seconds <= 0:
            continue
        weight_type, size = sizes.get(name, ("", 0))
        role = next((product for product in PRODUCTS if product in name), name) if size else ""
        kinds[f"{role}, {weight_type}" if size else type_, kernel].append((seconds, size))
    parts = [
        Part(name, kernel, len(some), sum(s for s, _ in some) * 1e3, sum(size for _, size in some))
        for (name, kernel), some in kinds.items()
    ]
    return sorted(parts, key=lambda part: -part.ms)


def report(result: Pass, limit: float) -> str:
    """A table of one number of rows; `limit` is the bandwidth of the device, bytes per second."""
    rows = [("part", "nodes", "ms", "of the pass", "GB/s", "of the bandwidth", "kernel")]
    small = [part for part in result.parts if not part.weight_bytes and part.ms < 0.01 * result.ms]
    products = [part for part in result.parts if part.weight_bytes]
    shown = [part for part in result.parts if part not in small]
    if len(products) > 1:
        kernel = products[0].kernel if len({part.kernel for part in products}) == 1 else ""
        shown.insert(0, _total("all matrix products", products, kernel))
    shown.append(_total("other nodes", small))
    for part in shown:
        speed = part.bytes_per_s
        rates = (f"{speed / 1e9:.1f}", f"{speed / limit:.2f}") if speed else ("", "")
        rows.append((part.name, str(part.nodes), f"{part.ms:.2f}", f"{part.ms / result.ms:.3f}", *rates, part.kernel))
    between = result.ms - sum(part.ms for part in result.parts)
    rows.append(("between the nodes", "", f"{between:.2f}", f"{between / result.ms:.3f}", "", "", ""))
    return f"A pass of {result.rows} token(s): {result.ms:.2f} ms\n\n{table(rows)}"


def _total(name: str, parts: list[Part], kernel: str = "") -> Part:
    return Part(name, kernel, sum(p.nodes for p in parts), sum(p.ms for p in parts), sum(p.weight_bytes for p in parts))


def kernels(options: argparse.Namespace) -> str:
    """The kernel of each matrix product, from a run in another process in which oneDNN reports what it makes."""
    command = [sys.executable, __file__, str(options.model), "--device", options.device, "--repeat", "1", "--rows"]
    command += [str(rows) for rows in options.rows]
    for pair in options.ov_config:
        command += ["--ov-config", pair]
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    pattern = r"inner_product,([^,]+),.*?src:(\w+)\S* wei:(\S+).*?(dyn_quant_group_size:\d+)?;?,,(mb\d+ic\d+oc\d+)"
    rows = [("rows, inputs, outputs", "kernel", "input", "weights", "rounding of the input")]
    wanted = {str(count) for count in options.rows}
    for line in done.stdout.splitlines():
        if (found := re.search(pattern, line)) and (sizes := re.findall(r"\d+", found[5]))[0] in wanted:
            row = (", ".join(sizes), found[1], found[2], found[3].replace("::f0", ""), found[4] or "")
            if row not in rows:
                rows.append(row)
    return table(rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    add_load_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--repeat", type=int, default=20, metavar="N", help="passes of each (default: %(default)s)")
    parser.add_argument("--kernels", action="store_true", help="also print oneDNN's kernels; loads the model again")
    return parser.parse_args()


def main() -> int:
    """Measure, print the tables, write the JSON."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    check_or_demo(options)
    limit = bandwidth(options.device)
    began = time.perf_counter()
    results = measure(options)
    device, machine = measured_device(options), ov_phi3.Machine.here()
    print(f"{machine}\n{options.model} on {device}, {' '.join(options.ov_config) or 'the defaults'}")
    print(f"memory bandwidth: {limit / 1e9:.1f} GB/s\n")
    print("\n\n".join(report(result, limit) for result in results))
    if options.kernels:
        print(f"\n{kernels(options)}")
    if options.json:
        figures = {"bandwidth_bytes_per_s": limit, "passes": [result.to_dict() for result in results]}
        head = {"machine": machine.to_dict(), "device": asdict(device), "model": str(options.model)}
        write_json(options.json, {**head, **figures, "seconds": time.perf_counter() - began})
    return 0


if __name__ == "__main__":
    exit_with(main)
