"""Shared by the benchmark scripts: arguments, the check of the device, the progress line, JSON output."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ov_phi3
from _environment import BootstrapError, demo_model
from ov_phi3.cli.terminal import add_property_argument, properties

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Refused",
    "add_load_arguments",
    "add_model_arguments",
    "check",
    "check_or_demo",
    "command",
    "exit_with",
    "load_options",
    "measured_device",
    "progress",
    "refusal",
    "write_json",
]


def add_model_arguments(parser: argparse.ArgumentParser, *, device: str) -> None:
    """Add the arguments for the model, the device and the output file."""
    parser.add_argument("model", type=Path, nargs="?", help="directory of an exported model")
    parser.add_argument("--device", default=device, help="exactly one device (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples to this file")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load_options` reads."""
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens that prompt and reply share")
    add_property_argument(parser)


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `ov_phi3.load`."""
    config = properties(options.ov_config)
    return {"device": options.device, "context_length": options.context_length, "ov_config": config or None}


def refusal(options: argparse.Namespace, *, needs_model: bool = True) -> str | None:
    """The reason not to measure with these arguments, in a sentence; None if there is none.

    A figure under a device's name must be of that device, so no other device is measured in its place.
    """
    name = options.device.upper()
    if name.startswith("AUTO"):
        return f"--device {options.device} does not say which device is measured; name one device."
    available = ov_phi3.devices()
    if _find(name, available) is None:
        listed = ", ".join(str(device) for device in available) or "none"
        other = available[0].name if available else "CPU"
        return (
            f"there is no {name} here; nothing was measured. Devices here: {listed}. Name one of them, as in "
            f"--device {other}; 'ov-phi3 doctor --device {name}' shows what is missing."
        )
    if needs_model and options.model is None:
        return "name the directory of an exported model; 'python scripts/quickstart.py' makes one and prints its path."
    return None


def measured_device(options: argparse.Namespace) -> ov_phi3.DeviceInfo:
    """The device that `refusal` has accepted. A report shows its full name, which says if a GPU is emulated."""
    device = _find(options.device.upper(), ov_phi3.devices())
    assert device is not None
    return device


def _find(name: str, available: list[ov_phi3.DeviceInfo]) -> ov_phi3.DeviceInfo | None:
    return next((device for device in available if device.name in (name, f"{name}.0")), None)


def progress(text: str) -> None:
    """Show the current step on a terminal, in a line that the next call replaces; '' clears the line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class Refused(Exception):  # noqa: N818 - not a failure
    """A measurement that `check` refuses; the text is the reason."""


def check(options: argparse.Namespace, *, needs_model: bool = True) -> None:
    """Raise `Refused` if these arguments cannot be measured, see `refusal`."""
    if problem := refusal(options, needs_model=needs_model):
        raise Refused(problem)


def check_or_demo(options: argparse.Namespace) -> None:
    """Like `check`; without a model it is the demo model from here on."""
    check(options, needs_model=False)
    options.model = options.model or demo_model("int4")


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a script's main function and exit with its code, without a traceback where the reason is known.

    The code is 2 for arguments that `check` refuses, 1 for an error of the library or of a step that prepares the
    measurement, and 130 for Ctrl-C.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code, reason = 130, "interrupted; nothing was written"
    except Refused as refused:
        code, reason = 2, str(refused)
    except (ov_phi3.Error, BootstrapError) as error:
        code, reason = 1, str(error)
    else:
        progress("")
        sys.exit(code)
    progress("")
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.exit(code)


def command() -> str:
    """The command line, ready to be run again."""
    return shlex.join(["python", *sys.argv])


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, with the command that made it."""
    path.write_text(json.dumps({"command": command(), **report}, indent=2) + "\n", encoding="utf-8")
