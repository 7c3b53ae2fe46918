"""`ov-phi3 export`, `bench`, `devices` and `doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ov_phi3.bench.table import table
from ov_phi3.cli import terminal
from ov_phi3.cli.model_list import remember
from ov_phi3.errors import ConfigError
from ov_phi3.exporting.flags import RECIPES

__all__ = ["add_bench", "add_devices", "add_doctor", "add_export"]


def add_export(commands: Any) -> None:
    """Add the `export` command."""
    parser = commands.add_parser(
        "export",
        help="convert a model with optimum-cli",
        description="Convert a model with optimum-cli, verify the result and write a manifest. Any other flag of "
        "`optimum-cli export openvino` can be added, such as --group-size 64 --awq.",
    )
    parser.add_argument(
        "source", help="a local directory, or a Hugging Face name such as microsoft/Phi-3-mini-4k-instruct"
    )
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--recipe", default="int4", help=f"{', '.join(RECIPES)} (default: int4, the cookbook's)")
    parser.add_argument("--adapter", metavar="PATH", help="merge a LoRA adapter of the source, a folder or a hub name")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the source")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("--json", action="store_true", help="print a description of the result as JSON")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    import ov_phi3

    info = ov_phi3.export(
        args.source,
        args.output,
        recipe=args.recipe,
        adapter=args.adapter,
        trust_remote_code=args.trust_remote_code,
        overwrite=args.overwrite,
        progress=terminal.progress,
        **_flags(args.extra),
    )
    remember(info)
    if args.json:
        print(json.dumps(info.to_dict(), indent=2))
    else:
        print(f"{info.path}: {info.family}, {info.quantization}, {info.weight_bytes / 2**20:.0f} MiB of weights")
    return 0


def _flags(extra: Sequence[str]) -> dict[str, Any]:
    """Flags for optimum-cli as keyword arguments: `--group-size 64 --awq` becomes `group_size=64, awq=True`."""
    flags: dict[str, Any] = {}
    name = ""
    for item in extra:
        if item.startswith("--"):
            name, equals, value = item[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = _number(value) if equals else True
        elif not name or flags[name] is not True:
            raise ConfigError(f"unexpected argument {item!r}; flags for optimum-cli look like --group-size 64.")
        else:
            flags[name] = _number(item)
    return flags


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def add_bench(commands: Any) -> None:
    """Add the `bench` command."""
    parser = commands.add_parser(
        "bench",
        help="measure latency",
        description="Measure time to first token (TTFT) and time per output token (TPOT): medians over fresh prompts "
        "of exact lengths, compared with the speed that memory bandwidth allows.",
    )
    terminal.add_load_arguments(parser)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs="+",
        default=[32, 256],
        metavar="N",
        help="prompt lengths (default: 32 256)",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="tokens per reply (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="replies per length (default: %(default)s)")
    parser.add_argument(
        "--ends",
        choices=["forced", "natural"],
        default="forced",
        help="all replies have --new-tokens tokens, or end at end tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--chat-turns", type=int, default=0, metavar="N", help="also measure a chat of N turns (default: %(default)s)"
    )
    parser.add_argument(
        "--roofline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the memory bandwidth, and report the fraction in use (default: yes)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the whole report with every sample as JSON")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from ov_phi3.bench.measuring import check_plan, measure

    check_plan(args.prompt_tokens, args.new_tokens, args.repeat, args.ends, args.chat_turns, args.seed)
    with terminal.load(args) as pipe, terminal.status_line() as show:
        report = measure(
            pipe,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            repeat=args.repeat,
            ends=args.ends,
            chat_turns=args.chat_turns,
            roofline=args.roofline,
            seed=args.seed,
            progress=show,
        )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0


def add_devices(commands: Any) -> None:
    """Add the `devices` command."""
    parser = commands.add_parser(
        "devices", help="list the devices", description="List the devices that OpenVINO finds on this machine."
    )
    parser.add_argument("--json", action="store_true", help="print all properties as JSON")
    parser.set_defaults(run=_devices)


def _devices(args: argparse.Namespace) -> int:
    import ov_phi3

    available = ov_phi3.devices()
    if args.json:
        print(json.dumps([asdict(d) for d in available], indent=2))
    else:
        print(table([(d.name, d.full_name, _kind(d)) for d in available]))
    return 0


def _kind(device: Any) -> str:
    if device.kind != "GPU":
        return str(device.kind)
    return {True: "discrete GPU", False: "integrated GPU"}.get(device.discrete, "GPU")


def add_doctor(commands: Any) -> None:
    """Add the `doctor` command."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine and a model",
        description="Check versions, devices, drivers, permissions, memory and a model, and show fixes. The exit code "
        "is 1 if a check fails.",
    )
    parser.add_argument("model", type=Path, nargs="?", help="directory of an exported model to check")
    parser.add_argument("--device", default="AUTO", help="the device to check (default: %(default)s)")
    parser.add_argument(
        "--canary", action=argparse.BooleanOptionalAction, help="run a short greedy reply (default: yes)"
    )
    terminal.add_draft_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from ov_phi3.doctor import diagnose, worst

    checks = diagnose(
        args.model,
        args.device,
        canary=args.canary,
        draft_model=args.draft_model,
        draft_device=args.draft_device,
    )
    if args.json:
        print(json.dumps([asdict(c) for c in checks], indent=2))
    else:
        for check in checks:
            print(f"{check.status:8} {check.name}: {check.detail}")
            if check.fix:
                print(f"{'':8} -> {check.fix}")
    if worst(checks) != "error":
        return 0
    failed = [c.name for c in checks if c.status == "error"]
    print(f"ov-phi3: {len(failed)} check(s) failed: {', '.join(failed)}", file=sys.stderr)
    return 1
