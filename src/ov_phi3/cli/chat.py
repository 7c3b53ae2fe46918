"""`ov-phi3 chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.cli import preflight, terminal
from ov_phi3.cli.options import add_generation_options, generation_config
from ov_phi3.cli.texts import StandardInput, checked_argument, read_text
from ov_phi3.errors import ConfigError, Error

if TYPE_CHECKING:
    from ov_phi3.cli.session import Session
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix

__all__ = ["add_chat"]


def add_chat(commands: Any) -> None:
    """Add the `chat` command."""
    parser = commands.add_parser("chat", help="a conversation", description="A conversation. /help shows its commands.")
    terminal.add_load_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--system-file", type=Path, metavar="FILE", help="a file with the system message")
    parser.add_argument(
        "--prefix", type=Path, metavar="FILE", help="the system message, prefilled by `ov-phi3 cache build`"
    )
    parser.add_argument("--load", type=Path, metavar="FILE", help="continue a conversation that /save wrote")
    parser.add_argument(
        "--overflow",
        choices=["drop_oldest", "error"],
        default="drop_oldest",
        help="if a turn does not fit the window: drop the oldest turns, or refuse it (default: %(default)s)",
    )
    parser.add_argument("--plain", action="store_true", help="print replies as they are, not rendered as Markdown")
    add_generation_options(parser)
    parser.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    from ov_phi3.cli.replies import printer
    from ov_phi3.cli.session import Session

    config = generation_config(args)
    system = _system(args)
    preflight.check_streams(config)
    preflight.check_files(args.prefix, args.load)
    config, backend = _with_loop_stop(args, config)
    with terminal.load(args, backend) as pipe:
        preflight.warn_of_unused_seed(config, pipe.defaults)
        prefix = None if args.prefix is None else _load_prefix(pipe, args.prefix, system)  # noqa: F841 - a live Prefix stays cached
        chat = pipe.chat(system=system, overflow=args.overflow)
        session = Session(pipe, printer(plain=args.plain), dict(config.given), chat)
        session.properties = terminal.properties(args.ov_config)
        if args.load is not None:
            session.load(str(args.load))
        _talk(session)
    return 0


def _talk(session: Session) -> None:
    """Read and answer messages until the input ends."""
    from ov_phi3.cli.commands import Completions
    from ov_phi3.cli.keyboard import reader

    messages = reader(Completions())
    session.help = messages.help
    if sys.stdin is not None and sys.stdin.isatty():
        terminal.wrapped_note(f"/help shows the commands. {messages.help}")
    while (text := messages.read()) is not None:
        if text.startswith("/") and not text.startswith("//"):
            if not session.run(text.rstrip()):
                break
        elif text.strip():
            session.turn(text.removeprefix("/").rstrip() if text.startswith("//") else text.rstrip())


def _system(args: argparse.Namespace) -> str | None:
    """The system message of the command line.

    Raises:
        ConfigError: it cannot be read, or a saved conversation has one.
    """
    preflight.contradict(
        args,
        [
            ("system", "system_file", "give the system message once"),
            ("load", "system", "the saved conversation has its own system message"),
            ("load", "system_file", "the saved conversation has its own system message"),
            ("load", "prefix", "the saved conversation has its own keys and values"),
        ],
    )
    if args.system_file is not None:
        return read_text(args.system_file, StandardInput())
    return None if args.system is None else checked_argument("--system", args.system)


def _with_loop_stop(args: argparse.Namespace, config: GenerationConfig) -> tuple[GenerationConfig, str]:
    """The options with a loop stop, and the backend; without one where no backend has it that can run here.

    Raises:
        ConfigError: options that contradict each other, do not fit the model, or that no backend supports.
    """
    from ov_phi3.backends.registry import backend_spec
    from ov_phi3.cli.session import LOOP
    from ov_phi3.system import devices

    saved = [args.prefix, args.load]
    backend = preflight.check_reply(args, config, saved)
    if config.stop_on_loop is not None or args.backend == "llm_pipeline":
        return config, backend
    guarded = config.replace(stop_on_loop=LOOP)
    try:
        able = preflight.check_reply(args, guarded, saved)
        device = devices.resolve(args.device, devices.devices())
        backend_spec(able).resolve_properties(device, terminal.properties(args.ov_config))
    except Error:  # such as a device, or a property, of the other backend; loading names what is wrong with it
        return config, backend
    return guarded, able


def _load_prefix(pipe: Pipeline, file: Path, system: str | None) -> Prefix:
    """Load the prefix that the conversation begins with.

    Raises:
        ConfigError: the conversation begins with other tokens.
    """
    prefix = pipe.load_prefix(file)
    messages = [] if system is None else [{"role": "system", "content": system}]
    ids = pipe.tokenizer.encode_segments(pipe.tokenizer.template.beginning(messages)).tolist()
    if ids[: len(prefix)] != prefix.token_ids.tolist():
        raise ConfigError(
            f"--prefix {file} does not match the beginning of this conversation; give the --system text that "
            "the prefix was built from."
        )
    return prefix
