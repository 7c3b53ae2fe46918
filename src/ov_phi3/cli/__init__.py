"""The command line: arguments, output and exit codes. Every command calls the public API of the library."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ov_phi3._version import __version__
from ov_phi3.cli import terminal
from ov_phi3.cli.completion import HIDDEN, complete
from ov_phi3.cli.model_list import find_model
from ov_phi3.cli.parser import CommandParser
from ov_phi3.cli.words import in_flags
from ov_phi3.errors import ConfigError, Error, ExportError

__all__ = ["build_parser", "main"]


def build_parser() -> CommandParser:
    """The parser of `ov-phi3`, with a subparser per command."""
    from ov_phi3.cli import cache, chat, completion, generate, models, serve, tools

    parser = CommandParser(
        prog="ov-phi3",
        description="Run Phi-3 class language models on Intel hardware with OpenVINO GenAI.",
        epilog="Exit codes: 0 success, 1 failure with a line on stderr, 2 wrong usage, 130 Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"ov-phi3 {__version__}")
    commands = parser.add_subparsers(
        title="commands",
        dest="command",
        metavar="COMMAND",
        required=True,
        parser_class=CommandParser,
    )
    tools.add_export(commands)
    models.add_models(commands)
    generate.add_generate(commands)
    chat.add_chat(commands)
    serve.add_batch(commands)
    serve.add_serve(commands)
    cache.add_cache(commands)
    tools.add_bench(commands)
    tools.add_devices(commands)
    tools.add_doctor(commands)
    completion.add_completion(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an unprintable character must not end the reply
    parser, words = build_parser(), sys.argv[1:] if argv is None else list(argv)
    if words[:1] == [HIDDEN]:
        print("".join(f"{word}\n" for word in complete(parser, words[1:])), end="")
        return 0
    args, extra = parser.parse_known_args(words)
    if extra and args.command != "export":
        args.parser.error(args.parser.describe_unknown(extra))
    args.extra = extra
    terminal.set_quiet(getattr(args, "quiet", False))
    try:
        if getattr(args, "model", None) is not None:
            args.model = find_model(args.model)
        return int(args.run(args))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone. Redirect it, so that the flush at exit does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Error, OSError) as exc:
        message = in_flags(_one_line(exc), args.parser.flags)
        print(f"ov-phi3: {type(exc).__name__}: {message}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1


def _one_line(exc: BaseException) -> str:
    """The message of an error on one line, without the output of optimum-cli, which was shown already."""
    text = str(exc).partition("\n")[0] if isinstance(exc, ExportError) else str(exc)
    return " ".join(text.split())
