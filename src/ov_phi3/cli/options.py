"""Command-line flags for the options of a reply, made from the fields of `GenerationConfig`."""

from __future__ import annotations

import argparse
import inspect
import re
from typing import Any

from ov_phi3.cli.texts import at_file
from ov_phi3.cli.words import in_flags
from ov_phi3.errors import ConfigError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.validation import BOOLEANS, CHOICES, INTEGERS, NUMBERS

__all__ = ["OPTION_FLAGS", "add_generation_options", "generation_config", "help_texts", "read_value"]

_NOT_ON_A_COMMAND_LINE = ("logits_processors",)  # functions
OPTION_FLAGS = {
    name: "--" + name.replace("_", "-")
    for name in GenerationConfig.__dataclass_fields__
    if name not in _NOT_ON_A_COMMAND_LINE
}
"""Name of each option that a flag can hold -> the flag."""

# Help texts where the docstring speaks of Python's values.
_HELP = {
    "json_schema": "the reply is JSON of this schema: its text, or @FILE",
    "grammar": "the reply follows this EBNF grammar: its text, or @FILE",
    "bad_words": "a text that does not occur in the reply, however it is cut into tokens",
    "stop": "a string that ends the reply and is not shown",
    "dry_sequence_breakers": "a text at which a repetition begins anew for DRY",
    "logit_bias": "a number added to the logit of a token id; -inf excludes the token",
    "num_return_sequences": "number of replies; more than one needs sampling or beams",
    "num_beams": "above 1 is beam search",
    "seed": "seed of the sampling; default: a random one, which --json shows",
    "dry_multiplier": "above 0 lowers the logits of what would prolong a repetition of n tokens, by this number times "
    "DRY_BASE ** (n - DRY_ALLOWED_LENGTH) (DRY, text-generation-webui #5677; needs --backend infer_request)",
    "num_assistant_tokens": "drafts per step of prompt lookup; on llm_pipeline it needs --ov-config prompt_lookup=true",
    "stop_on_loop": "end the reply when the same part, of at most WINDOW tokens, has come REPEATS times in a row",
    "top_logprobs": "print the log-probability of each token, and of this many most likely tokens (0 to 20)",
    "do_sample": "sample, or take the most likely token; default: sample if a sampling option is given",
}


def help_texts() -> dict[str, str]:
    """What each option does: its paragraph in the docstring of `GenerationConfig`, in the command line's words."""
    doc = inspect.cleandoc(GenerationConfig.__doc__ or "")
    entries = re.findall(r"^    (\w+): (.+(?:\n {6,}.+)*)", doc, re.MULTILINE)
    flags = {**OPTION_FLAGS, "backend": "--backend", "ov_config": "--ov-config"}
    texts = {name: in_flags(" ".join(text.replace("`", "").split()), flags) for name, text in entries}
    return {**texts, **_HELP}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option that a flag can hold; its help text is that of the class docstring."""
    group = parser.add_argument_group("generation options (default: the model's own)")
    texts = help_texts()
    for name, flag in OPTION_FLAGS.items():
        text = texts[name].rstrip(".;").replace("%", "%%")
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
        elif name in CHOICES:
            group.add_argument(flag, choices=CHOICES[name], help=text)
        else:
            kind: Any = int if name in INTEGERS else float if name in NUMBERS else str
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, metavar=metavar, help=text)


def generation_config(args: argparse.Namespace) -> GenerationConfig:
    """The options given on the command line.

    Raises:
        ConfigError: an option out of range, options that contradict each other, or a file that cannot be read.
    """
    return GenerationConfig(**{name: read_value(name, getattr(args, name, None)) for name in OPTION_FLAGS})


def read_value(name: str, value: Any) -> Any:
    """The value of an option as the parser of the command line gives it, in the form that `GenerationConfig` takes.

    Raises:
        ConfigError: not a bias of a token id, or a file that cannot be read.
    """
    if value is None:
        return None
    if name == "logit_bias":
        return dict(_bias(pair) for pair in value)
    return at_file(value) if name in ("json_schema", "grammar") else value


def _bias(pair: str) -> tuple[int, float]:
    token, _, bias = pair.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as exc:
        raise ConfigError(f"logit_bias {pair!r}; expected ID=BIAS, a token id and a number.") from exc
