"""`ov-phi3 generate`: one prompt, one reply or several."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.cli import preflight, terminal
from ov_phi3.cli.options import add_generation_options, generation_config
from ov_phi3.cli.replies import describe, print_logprobs, show
from ov_phi3.cli.texts import STDIN, StandardInput, checked_argument, read_text
from ov_phi3.errors import ConfigError

if TYPE_CHECKING:
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.generation.results import GenerationResult
    from ov_phi3.pipeline import Pipeline

__all__ = ["add_generate"]


def add_generate(commands: Any) -> None:
    """Add the `generate` command."""
    parser = commands.add_parser(
        "generate",
        help="one reply to one prompt",
        description="One reply to one prompt: PROMPT, the files, and what is piped in, with empty lines between them.",
    )
    terminal.add_load_arguments(parser)
    parser.add_argument("prompt", nargs="?", help="the prompt; - reads standard input in its place")
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a text file that belongs to the prompt; - is standard input; repeatable",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--system-file", type=Path, metavar="FILE", help="a file with the system message")
    parser.add_argument(
        "--prefix", type=Path, metavar="FILE", help="saved KV cache to continue from, made by `ov-phi3 cache build`"
    )
    parser.add_argument(
        "--raw", action="store_true", help="apply no chat template to the prompt, and parse its control tokens"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="end the reply after this many seconds")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON instead of streaming text")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the reply, and errors")
    add_generation_options(parser)
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    config = generation_config(args)
    prompt = _prompt(args)
    preflight.check_timeout(args)
    preflight.check_files(args.prefix)
    backend = preflight.check_reply(args, config, [args.prefix])
    with terminal.load(args, backend) as pipe:
        preflight.warn_of_unused_seed(config, pipe.defaults)
        return _reply(args, pipe, prompt, config)


def _reply(args: argparse.Namespace, pipe: Pipeline, prompt: Any, config: GenerationConfig) -> int:
    """Print the reply; return the exit code."""
    prefix = None if args.prefix is None else pipe.load_prefix(args.prefix)
    how: dict[str, Any] = {"prefix": prefix, "timeout": args.timeout}
    if args.json:
        result = pipe.generate(prompt, config, **how)
        report = {**result.to_dict(), "device": pipe.device.name, "device_name": pipe.device.full_name}
        print(json.dumps(report, indent=2))
        return 0
    interrupted = False
    if config.is_multi_sequence:
        result = pipe.generate(prompt, config, **how)
        _print_alternatives(result)
    else:
        bar = terminal.PrefillBar()
        result, interrupted = show(pipe.stream(prompt, config, on_prefill=bar, **how), bar)
    if result.logprobs:
        print_logprobs(result.logprobs)
    terminal.note(describe(result))
    return 130 if interrupted else 0


def _prompt(args: argparse.Namespace) -> Any:
    """The prompt that a command line describes.

    Raises:
        ConfigError: it is empty or cannot be read, or flags contradict each other.
    """
    from ov_phi3.text.template import Raw

    preflight.contradict(
        args,
        [
            ("system", "system_file", "give the system message once"),
            ("raw", "system", "a raw prompt has its own system message"),
            ("raw", "system_file", "a raw prompt has its own system message"),
            ("prefix", "system", "the prefix holds the system message already"),
            ("prefix", "system_file", "the prefix holds the system message already"),
        ],
    )
    stdin = StandardInput()
    text = _text(args, stdin)
    system = None if args.system is None else checked_argument("--system", args.system)
    if args.system_file is not None:
        system = read_text(args.system_file, stdin)
    if args.raw:
        return Raw(text)
    return text if system is None else [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _text(args: argparse.Namespace, stdin: StandardInput) -> str:
    """The prompt's text from arguments, files and standard input."""
    parts = []
    if args.prompt == STDIN:
        parts.append(stdin.read(exact=args.raw))
    elif args.prompt is not None:
        parts.append(checked_argument("PROMPT", args.prompt))
    parts += [read_text(path, stdin, exact=args.raw) for path in args.file]
    if args.system_file != Path(STDIN) and (stdin.is_fed or not (parts or stdin.is_terminal)):
        parts.append(stdin.read(exact=args.raw))
    if not parts:
        raise ConfigError("there is no prompt: give PROMPT or --file, or pipe a text in.")
    text = "\n\n".join(part for part in parts if part)
    if not text.strip():
        raise ConfigError("the prompt is empty: give a text as PROMPT, with --file, or on standard input.")
    return text


def _print_alternatives(result: GenerationResult) -> None:
    """Print all replies, best first; a single one as it is."""
    if len(result.alternatives) < 2:
        print(result.text)
        return
    for number, reply in enumerate(result.alternatives, 1):
        ending = "" if reply.finish_reason == "stop" else f", {reply.finish_reason}"
        print(f"--- reply {number} of {len(result.alternatives)}, score {reply.score:.3f}{ending} ---")
        print(reply.text)
