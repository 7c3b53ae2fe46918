"""Checks of the command lines in the README and in the pages under `docs/`: the real parser accepts each of them."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import DOCS, PAGES, Block, blocks, name_of

import ov_phi3
from ov_phi3.cli import build_parser, tools
from ov_phi3.cli.options import generation_config as options_of
from ov_phi3.exporting.flags import combine
from ov_phi3.generation import config as generation_config

SHELLS = ("bash", "powershell")


def command_lines(block: Block) -> Iterator[list[str]]:
    """The arguments of each `ov-phi3` (or `python -m ov_phi3`) in a block of shell commands."""
    for line in re.sub(r"[\\`]\n", " ", block.text).splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "|"]:
            if word != "|":
                command.append(word)
                continue
            redirections = [at for at, argument in enumerate(command) if argument in ("<", ">")]
            command = command[: min(redirections, default=None)]
            if command[:1] == ["ov-phi3"]:
                yield command[1:]
            elif command[:3] == ["python", "-m", "ov_phi3"]:
                yield command[3:]
            command = []


COMMANDS = [
    pytest.param(arguments, id=f"{block.location}-{at}")
    for page in PAGES
    for block in blocks(page)
    if block.language in SHELLS
    for at, arguments in enumerate(command_lines(block))
]


def check_command(arguments: list[str]) -> None:
    """Run the checks that the command line does before it loads a model."""
    args, extra = build_parser().parse_known_args(arguments)
    assert args.command == "export" or not extra, extra
    if args.command == "export":
        combine(args.recipe, tools._flags(extra))
    if args.command in ("generate", "chat"):
        options_of(args)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_line_is_accepted_by_the_real_parser(arguments: list[str]) -> None:
    with contextlib.suppress(SystemExit):
        check_command(arguments)
        return
    assert arguments in (["--version"], ["--help"]) or arguments[1:] == ["--help"], arguments


def test_there_are_command_lines_of_every_command() -> None:
    assert len(COMMANDS) >= 38
    shown = {arguments[0] for param in COMMANDS if (arguments := param.values[0])}
    assert shown >= {"export", "generate", "chat", "bench", "devices", "doctor"}


def test_command_lines_are_extracted_whole(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\ncat a.txt | ov-phi3 generate m - \\\n    --seed 1 > b.txt  # a comment\n"
        "python -m ov_phi3 devices\n```\n\n```powershell\nov-phi3 generate m `\n    'a b'\n```\n"
    )
    assert [line for block in blocks(page) for line in command_lines(block)] == [
        ["generate", "m", "-", "--seed", "1"],
        ["devices"],
        ["generate", "m", "a b"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_can_be_copied_as_they_are(page: Path) -> None:
    """No prompt sign before a command, and no block type whose commands are not checked."""
    assert [block.location for block in blocks(page) if block.language in ("console", "sh", "shell")] == []
    assert [b.location for b in blocks(page) if b.language in SHELLS and re.search(r"^(\$|>) ", b.text, re.M)] == []


def test_a_wrong_command_line_is_detected() -> None:
    with pytest.raises(ov_phi3.ConfigError, match="group_siz"):
        check_command(["export", "a", "b", "--group-siz", "64"])
    with pytest.raises(SystemExit):
        check_command(["generate"])
    with pytest.raises(AssertionError):
        check_command(["generate", "m", "--max-tokens", "3"])


def test_cli_page_names_every_command_and_every_flag() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    assert commands is not None
    options = {"--" + name.replace("_", "-") for name in generation_config.GenerationConfig.__dataclass_fields__}
    for name, parser in dict(commands).items():
        assert f"ov-phi3 {name}" in text, name
        flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
        missing = [f for f in flags - options - {"--help"} if not re.search(rf"`{f}[ `]", text)]
        missing = [f for f in missing if not f.startswith("--no-")]
        assert not missing, (name, missing)
