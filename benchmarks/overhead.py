"""What Python does in a step of our own engine: microseconds by part, at the start of a reply and at its end.

    python benchmarks/overhead.py [MODEL] [--device CPU] [--new-tokens N] [--sampling] [--schema] [--json FILE]

One reply is generated on `backend="infer_request"` while the functions of a step are timed, each without the functions
below it that are timed too. The two columns are medians over the first and the last quarter of the steps: work that
grows with the reply shows as their difference. The timers themselves take about half a microsecond a call. Without
MODEL, the demo model is used.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import ov_phi3
from _common import add_model_arguments, check_or_demo, exit_with, measured_device, progress, write_json
from ov_phi3.bench.table import table

PASS = "the model's pass"
STEP = "the rest of the step"
PARTS = {
    STEP: ("paged.engine:PagedEngine._step",),
    "schedule": ("paged.scheduler:Scheduler.schedule",),
    "whether the reply is wanted": ("paged.group:Group.wanted",),
    "set the inputs": ("paged.model_runner:_Inputs.fill",),
    PASS: ("paged.model_runner:ModelRunner._infer",),
    "get the output": ("paged.model_runner:ModelRunner.run",),
    "note what is cached": ("paged.prefix_store:PrefixStore.register_full_blocks",),
    "choose a token": ("sampling:Sampler.choose", "paged.token_chooser:TokenChooser.choose"),
    "which tokens the structure allows": (
        "paged.constraint:Constraint.prepare",
        "paged.constraint:Constraint.forced",
        "paged.constraint:Constraint.consume",
    ),
    "deliver the token: text, stop strings, chunk": ("paged.group:ReplyGroup.advance",),
}
"""The functions of a step, in modules of `ov_phi3.backends`."""


class Timers:
    """Own time of functions by part, one record for each step.

    Attributes:
        steps: for each step, seconds by part.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._below = [0.0]  # time of the timed functions that each running one has called

    def wrap(self, part: str, path: str) -> None:
        """Time a function or a property from now on."""
        module, _, names = path.partition(":")
        owned_by, _, name = names.partition(".")
        owner = getattr(importlib.import_module(f"ov_phi3.backends.{module}"), owned_by)
        found = vars(owner)[name]
        timed = self._timed(part, found.fget if isinstance(found, property) else found)
        setattr(owner, name, property(timed) if isinstance(found, property) else timed)

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part == STEP:
                self.steps.append(dict.fromkeys(PARTS, 0.0))
            self._below.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - began
                own = seconds - self._below.pop()
                self._below[-1] += seconds
                if self.steps:
                    self.steps[-1][part] += own

        return timed


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument("--new-tokens", type=int, default=800, metavar="N", help="default: %(default)s")
    parser.add_argument("--sampling", action="store_true", help="draw from the 0.95 nucleus instead of the best token")
    parser.add_argument("--schema", action="store_true", help="a reply that follows a JSON schema")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds by part, for each step of a reply after its first token."""
    config: dict[str, Any] = {"do_sample": False}
    if options.sampling:
        config = {"temperature": 1.0, "top_p": 0.95, "seed": 1}
    if options.schema:
        config["json_schema"] = {"type": "array", "items": {"type": "string"}, "minItems": 10**4}
    with ov_phi3.load(options.model, options.device, backend="infer_request") as pipe:
        config |= {"ignore_eos": True, "max_new_tokens": options.new_tokens}
        prompt = "Write down as many names of towns as you know."
        pipe.generate(prompt, **{**config, "max_new_tokens": 16})
        timers = Timers()
        for part, functions in PARTS.items():
            for path in functions:
                timers.wrap(part, path)
        for _ in pipe.stream(prompt, **config):
            pass
    return timers.steps[1:]


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = parse_arguments()
    warnings.simplefilter("ignore", ov_phi3.ModelWarning)
    check_or_demo(options)
    steps = measure(options)
    progress("")
    quarter = max(1, len(steps) // 4)
    rows = [("part", "first quarter, us", "last quarter, us")]
    for part in PARTS:
        first, last = (statistics.median(s[part] for s in some) * 1e6 for some in (steps[:quarter], steps[-quarter:]))
        rows.append((part, f"{first:.0f}", f"{last:.0f}"))
    python = [
        statistics.median(sum(s.values()) - s[PASS] for s in some) * 1e6 for some in (steps[:quarter], steps[-quarter:])
    ]
    rows.append(("Python in all", f"{python[0]:.0f}", f"{python[1]:.0f}"))
    device = measured_device(options)
    print(f"{ov_phi3.Machine.here()}\n{options.model} on {device}, {len(steps)} steps\n\n{table(rows)}")
    if options.json:
        machine = ov_phi3.Machine.here().to_dict()
        write_json(options.json, {"machine": machine, "device": asdict(device), "steps": steps})
    return 0


if __name__ == "__main__":
    exit_with(main)
