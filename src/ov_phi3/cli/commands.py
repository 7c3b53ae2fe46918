"""The commands of a chat: their names and meanings, what can be completed, and values of `/set`."""

from __future__ import annotations

import re
import shlex
from typing import Any, NamedTuple, NoReturn

from ov_phi3.cli.options import OPTION_FLAGS, add_generation_options, help_texts, read_value
from ov_phi3.cli.parser import CommandParser
from ov_phi3.errors import ConfigError
from ov_phi3.generation.names import ALIASES
from ov_phi3.generation.validation import BOOLEANS, CHOICES

__all__ = ["COMMANDS", "LEAVES", "PROMPT", "SYNONYMS", "Completions", "option_name", "option_value"]


PROMPT = "> "
LEAVES = "Ctrl-D or /exit leaves."


class Command(NamedTuple):
    """A command: what follows its name, and what it does."""

    arguments: str
    meaning: str


COMMANDS = {
    "/help": Command("", "show the commands"),
    "/exit": Command("", "leave; Ctrl-D does too"),
    "/clear": Command("", "start over, with the same system message"),
    "/retry": Command("", "take back the last reply and generate another one"),
    "/system": Command(
        "[TEXT]", "show the system message, or set it for the whole conversation; /system none removes it"
    ),
    "/show": Command("", "show the conversation, the model and the options"),
    "/save": Command("FILE", "save the conversation"),
    "/load": Command("FILE", "continue a conversation that /save wrote"),
    "/rewind": Command("[N]", "take back the last N turns (1)"),
    "/kv": Command("", "show what the KV cache holds"),
    "/set": Command("[OPTION [VALUE]]", "show or set an option; off: without it, default: as the chat began"),
}
SYNONYMS = {"/quit": "/exit", "/reset": "/clear", "/?": "/help"}

_SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
_LISTS = ("stop", "bad_words", "dry_sequence_breakers", "logit_bias")
_SEVERAL = ("stop_token_ids", "stop_on_loop")
_WHOLE = ("json_schema", "regex", "grammar")


class Completions:
    """What can follow the beginning of a command."""

    with_path = ("/save", "/load")

    def __init__(self) -> None:
        self._meanings = {name: text.partition(";")[0].rstrip(".") for name, text in help_texts().items()}

    def after(self, text: str) -> list[tuple[str, str]]:
        """The words that can come last in a text that begins with a slash, each with its meaning."""
        words = text.split(" ")
        if len(words) == 1:
            return [(name, command.meaning) for name, command in COMMANDS.items()]
        if words[0] != "/set":
            return []
        if len(words) == 2:
            return [(name, self._meanings[name]) for name in OPTION_FLAGS]
        if len(words) == 3:
            values = (
                ("on", "off", "default") if words[1] in BOOLEANS else (*CHOICES.get(words[1], ()), "off", "default")
            )
            return [(value, "") for value in dict.fromkeys(values)]
        return []


class _ValueParser(CommandParser):
    """The flags of the options, to read single values: errors are raised."""

    def __init__(self) -> None:
        super().__init__(prog="/set", add_help=False)
        add_generation_options(self)

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_with_names(message.removeprefix("argument ")) + ".")


def _with_names(message: str) -> str:
    """A message with the names of options in place of flags."""
    return re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), message)


def option_name(word: str) -> str:
    """The option that a word means; names of other libraries are taken too.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    name = word.lstrip("-").replace("-", "_")
    name = ALIASES.get(name, name)
    if name in OPTION_FLAGS:
        return name
    _, _, hint = _ValueParser().describe_unknown([f"--{name.replace('_', '-')}"]).partition("; ")
    names = f"there are {', '.join(OPTION_FLAGS)}."
    raise ConfigError(f"{word!r} is not an option; {_with_names(hint) or names}")


def option_value(name: str, text: str) -> Any:
    """The value that a text means for an option.

    Raises:
        ConfigError: it is not such a value, or a file that cannot be read.
    """
    flag = OPTION_FLAGS[name]
    if name in BOOLEANS:
        if text.lower() not in _SWITCHES:
            raise ConfigError(f"{name} {text!r}; expected on or off.")
        return _SWITCHES[text.lower()]
    if name in _WHOLE:
        words = [f"{flag}={text}"]
    else:
        values = _split(text)
        if name in _LISTS:
            words = [f"{flag}={value}" for value in values]
        else:
            words = [flag, *values] if name in _SEVERAL else [f"{flag}={' '.join(values)}"]
    args, extra = _ValueParser().parse_known_args(words)
    if extra:
        raise ConfigError(f"{name} {text!r}: {extra[0]!r} is one value too many.")
    return read_value(name, getattr(args, name))


def _split(text: str) -> list[str]:
    """The words of a text, quoted ones without quotes; backslash n and t in them are a line end and a tab."""
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise ConfigError(f"{text!r}: {exc}.") from exc
    return [word.replace("\\n", "\n").replace("\\t", "\t") for word in words]
