"""What the benchmark scripts share: arguments, the device that is really meant, and a line that says what goes on."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ov_phi3

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "add_load_arguments",
    "add_model_arguments",
    "command",
    "exit_with",
    "load_options",
    "progress",
    "refusal",
    "write_json",
]


def add_model_arguments(parser: argparse.ArgumentParser, *, device: str) -> None:
    """The model, the device, and where the figures go."""
    parser.add_argument("model", type=Path, nargs="?", help="directory of an exported model")
    parser.add_argument("--device", default=device, help="exactly one device (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and every sample to this file")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded; see `load_options`."""
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens that prompt and reply share")
    parser.add_argument(
        "--ov-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an OpenVINO property, laid over the latency defaults; can be given several times",
    )


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `ov_phi3.load`."""
    properties: dict[str, Any] = {}
    for pair in options.ov_config:
        key, _, value = pair.partition("=")
        properties[key] = {"true": True, "false": False}.get(value.lower(), value)
    return {"device": options.device, "context_length": options.context_length, "ov_config": properties or None}


def refusal(options: argparse.Namespace, *, needs_model: bool = True) -> str | None:
    """Why nothing can be measured with these arguments, in a sentence; None when it can.

    A figure under a device's name must be of that device: no other one is ever measured in its place.
    """
    name = options.device.upper()
    if name.startswith("AUTO"):
        return f"--device {options.device} would leave open what is measured; name one device."
    present = ov_phi3.devices()
    if not any(device.name in (name, f"{name}.0") for device in present):
        listed = ", ".join(str(device) for device in present) or "none"
        other = present[0].name if present else "CPU"
        return (
            f"there is no {name} here, and nothing was measured. Devices here: {listed}. Name one of them, as in "
            f"--device {other}; 'ov-phi3 doctor --device {name}' tells what is missing."
        )
    if needs_model and options.model is None:
        return "name the directory of an exported model; 'python scripts/quickstart.py' makes one and tells its place."
    return None


def progress(text: str) -> None:
    """Say on a terminal what is going on, in a line that the next one replaces; '' clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a script's main function and end with its exit code; Ctrl-C is 130, and no traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        progress("")
        print("\ninterrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


def command() -> str:
    """The command line, as it could be run again."""
    return shlex.join(["python", *sys.argv])


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report with the command that made it."""
    path.write_text(json.dumps({"command": command(), **report}, indent=2) + "\n", encoding="utf-8")
