"""Command-line flags for the options of a reply, made from the fields of `GenerationConfig`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ov_phi3.errors import ConfigError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.validation import BOOLEANS, INTEGERS, NUMBERS

__all__ = ["add_generation_options", "generation_config"]


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option that a flag can hold; its help text is that of the class docstring."""
    group = parser.add_argument_group("generation options (default: the model's own)")
    help_texts = dict(re.findall(r"^        (\w+): (.+)", GenerationConfig.__doc__ or "", re.MULTILINE))
    for name in GenerationConfig.__dataclass_fields__:
        if name == "logits_processors":  # functions
            continue
        flag = "--" + name.replace("_", "-")
        text = help_texts.get(name, "").rstrip(".;").replace("%", "%%")
        if name in BOOLEANS:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif name in ("stop", "bad_words", "dry_sequence_breakers"):
            group.add_argument(flag, action="append", metavar="TEXT", help=text + "; repeatable")
        elif name == "logit_bias":
            group.add_argument(flag, action="append", metavar="ID=BIAS", help=text + "; repeatable")
        elif name == "stop_on_loop":
            group.add_argument(flag, type=int, nargs=2, metavar=("WINDOW", "REPEATS"), help=text)
        elif name == "stop_token_ids":
            group.add_argument(flag, type=int, nargs="+", metavar="ID", help=text)
        else:
            kind: Any = int if name in INTEGERS else float if name in NUMBERS else str
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, metavar=metavar, help=text)


def generation_config(args: argparse.Namespace) -> GenerationConfig:
    """The options given on the command line.

    Raises:
        ConfigError: an option out of range, or options that contradict each other.
    """
    options = {name: getattr(args, name, None) for name in GenerationConfig.__dataclass_fields__}
    if args.logit_bias is not None:
        options["logit_bias"] = dict(_bias(pair) for pair in args.logit_bias)
    return GenerationConfig(**options)


def _bias(pair: str) -> tuple[int, float]:
    token, _, bias = pair.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as exc:
        raise ConfigError(f"--logit-bias {pair!r}; expected ID=BIAS, a token id and a number.") from exc
