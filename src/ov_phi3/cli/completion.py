"""Completion of command lines: `ov-phi3 completion SHELL`, and the words that its scripts ask for.

A script calls `ov-phi3 __complete WORDS...` and offers what that prints: the parser itself knows commands, flags and
choices, and the list of models their names, so that nothing has to be generated for each shell. Where it prints
nothing, the shell completes file names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ov_phi3.cli.model_list import known_models
from ov_phi3.cli.parser import CommandParser

__all__ = ["HIDDEN", "SCRIPTS", "add_completion", "complete"]

HIDDEN = "__complete"

SCRIPTS = {
    "bash": """\
_ov_phi3() {
    local IFS=$'\\n'
    COMPREPLY=($(ov-phi3 __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _ov_phi3 ov-phi3
""",
    "zsh": """\
#compdef ov-phi3
_ov_phi3() {
    local -a found
    found=(${(f)"$(ov-phi3 __complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
compdef _ov_phi3 ov-phi3
""",
    "fish": """\
function __ov_phi3
    set -l found (ov-phi3 __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c ov-phi3 -f -a '(__ov_phi3)'
""",
    "powershell": """\
Register-ArgumentCompleter -Native -CommandName ov-phi3 -ScriptBlock {
    param($word, $line, $position)
    $words = @($line.CommandElements | Select-Object -Skip 1 | ForEach-Object { $_.ToString() })
    if ($word -eq '') { $words += '""' }
    ov-phi3 __complete @words 2>$null | ForEach-Object {
        [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_)
    }
}
""",
}
"""Shell -> the script that its start-up file runs."""


def add_completion(commands: Any) -> None:
    """Add the `completion` command."""
    parser = commands.add_parser(
        "completion",
        help="completion for your shell",
        description="Print a script that completes commands, flags and names of models in a shell.",
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell; docs/cli.md says where the script goes")
    parser.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> int:
    print(SCRIPTS[args.shell], end="")
    return 0


def complete(parser: CommandParser, words: Sequence[str]) -> list[str]:
    """What the last of some words can become.

    Args:
        parser: the parser of the whole command line.
        words: the words behind `ov-phi3`; the last one may be empty.

    Returns:
        Whole words; none where a file name may come, or nothing fits.
    """
    *before, last = [word if word != '""' else "" for word in words] or [""]
    index = values = 0
    choices: list[str] = []
    for word in before:
        if values and not word.startswith("-"):
            values -= 1
        elif (nested := parser.subcommands.get(word)) is not None:
            parser, index = nested, 0
        elif word.startswith("-"):
            values, choices = parser.values_after(word)
        else:
            index += 1
    if last.startswith("-"):
        found = parser.every_flag
    elif values:
        found = choices
    elif parser.subcommands:
        found = [] if index else list(parser.subcommands)
    else:
        name, found = parser.positional(index)
        if name == "model":
            found = [name for model in known_models() for name in (model.name, model.source)]
    return sorted({choice for choice in found if choice and choice.startswith(last)})
