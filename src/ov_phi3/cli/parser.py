"""The parser of a command: flags are never abbreviated, its usage is one line, and a wrong flag names the nearest."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from ov_phi3.generation.names import ALIASES

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser without abbreviated flags: an abbreviation would change its meaning when a flag is added."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; also take an optional prompt behind a flag, which argparse takes for a stray argument (bpo-15112)."""
        parsed, extra = super().parse_known_args(args, namespace)
        if getattr(parsed, "prompt", "") is None and len(extra) == 1 and not extra[0].startswith("--"):
            parsed.prompt = extra.pop()
        if not hasattr(parsed, "parser"):  # the innermost one comes first
            parsed.parser = self
        return parsed, extra

    def format_usage(self) -> str:
        """One line: the flags alone fill a screen, and --help lists them."""
        arguments = [action for action in self._actions if not action.option_strings]
        names = [(str(action.metavar or action.dest).upper(), action.nargs == "?") for action in arguments]
        words = [self.prog, *(f"[{name}]" if optional else name for name, optional in names), "[flags]"]
        return f"usage: {' '.join(words)}\n"

    def format_help(self) -> str:
        """The whole help, which begins with the short usage."""
        self.usage = self.format_usage().removeprefix("usage: ").strip()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message; exit with 2."""
        self.exit(2, f"{self.format_usage()}       {self.prog} --help lists the flags\n{self.prog}: error: {message}\n")

    @property
    def flags(self) -> dict[str, str]:
        """Name of each argument -> its flag; positional arguments have none."""
        return {action.dest: self._flag(action) for action in self._actions if action.option_strings}

    def _flag(self, action: argparse.Action) -> str:
        return next((flag for flag in action.option_strings if flag.startswith("--")), action.option_strings[0])

    def describe_unknown(self, extra: Sequence[str]) -> str:
        """The message about arguments that the command does not have, with the nearest flags."""
        unknown = [argument.partition("=")[0] for argument in extra if argument.startswith("-")]
        if not unknown:
            return f"unexpected argument {extra[0]!r}; put a text of several words in quotes"
        return "; ".join(f"unknown flag {name}{self._nearest(name)}" for name in unknown)

    def _nearest(self, unknown: str) -> str:
        """A question that names the flags that may have been meant; '' if none is near."""
        flags = self.every_flag
        ours = ALIASES.get(unknown.lstrip("-").replace("-", "_"))
        if ours is not None and (flag := "--" + ours.replace("_", "-")) in flags:
            return f", which is called {flag} here"
        begun = [flag for flag in flags if len(unknown) > 3 and flag.startswith(unknown)]
        near = begun[:3] or difflib.get_close_matches(unknown, flags, n=1, cutoff=0.75)
        return f"; did you mean {' or '.join(near)}?" if near else ""

    # -- for completion ----------------------------------------------------------------------------------------------

    @property
    def subcommands(self) -> dict[str, CommandParser]:
        """Name of each command -> its parser; empty for a command without commands of its own."""
        nested = (action.choices for action in self._actions if isinstance(action.choices, dict))
        return {name: parser for choices in nested for name, parser in choices.items()}

    @property
    def every_flag(self) -> list[str]:
        """All flags with two dashes, --no- forms too."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def values_after(self, flag: str) -> tuple[int, list[str]]:
        """How many values follow a flag, and the words that they may be, if these are known."""
        action = next((action for action in self._actions if flag in action.option_strings), None)
        if action is None or action.nargs == 0:
            return 0, []
        return action.nargs if isinstance(action.nargs, int) else 1, _words(action)

    def positional(self, index: int) -> tuple[str, list[str]]:
        """The name of an argument without a flag, and the words that it may be, if these are known."""
        actions = [action for action in self._actions if not action.option_strings and not self.subcommands]
        return (actions[index].dest, _words(actions[index])) if index < len(actions) else ("", [])


def _words(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices or ()]
