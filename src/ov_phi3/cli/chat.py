"""`ov-phi3 chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.cli import preflight, terminal
from ov_phi3.cli.options import add_generation_options, generation_config
from ov_phi3.cli.replies import describe, show
from ov_phi3.errors import ConfigError, Error

if TYPE_CHECKING:
    from ov_phi3.chat import Chat
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix

__all__ = ["add_chat"]

_HELP = (
    "Commands: /rewind [N] removes the last turns, /kv shows the KV cache, /save FILE saves the conversation, "
    "/reset starts over, /quit leaves, /help shows this. Ctrl-C stops a reply, Ctrl-D leaves."
)


def add_chat(commands: Any) -> None:
    """Add the `chat` command."""
    parser = commands.add_parser("chat", help="a conversation", description=f"A conversation. {_HELP}")
    terminal.add_load_arguments(parser)
    parser.add_argument("--system", help="a system message")
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
    add_generation_options(parser)
    parser.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    config = generation_config(args)
    preflight.contradict(
        args,
        [
            ("load", "system", "the saved conversation has its own system message"),
            ("load", "prefix", "the saved conversation has its own keys and values"),
        ],
    )
    if config.is_multi_sequence:
        several = "num_beams" if (config.num_beams or 1) > 1 else "num_return_sequences"
        raise ConfigError(f"{config.show(several)} does not work in a chat, whose replies stream; use `generate`.")
    preflight.check_files(args.prefix, args.load)
    backend = preflight.check_reply(args, config, [args.prefix, args.load])
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - adds history and line editing to input()
    with terminal.load(args, backend) as pipe:
        if (unused := preflight.unused_seed(config, pipe.defaults)) is not None:
            terminal.note(f"warning: {unused}")
        prefix = None if args.prefix is None else _load_prefix(pipe, args)  # noqa: F841 - a live Prefix stays cached
        chat = pipe.chat(system=args.system, overflow=args.overflow)
        if args.load is not None:
            chat = pipe.load_chat(args.load)
            chat.overflow = args.overflow
            terminal.note(f"{len(chat.messages)} messages, {_usage(chat)}")
        terminal.note(_HELP)
        while (text := _ask()) is not None:
            if text == "/quit":
                break
            if text == "/reset":
                chat = pipe.chat(system=args.system, overflow=args.overflow)
                terminal.note("A new conversation.")
            elif text == "/kv":
                terminal.note(_usage(chat))
            elif text.split()[:1] == ["/rewind"]:
                _rewind(chat, text.split()[1:])
            elif text.split()[:1] == ["/save"]:
                _save(chat, text.removeprefix("/save").strip())
            elif text.startswith("/"):
                terminal.note(_HELP if text == "/help" else f"{text.split()[0]} is not a command. {_HELP}")
            elif text:
                _turn(chat, text, config)
    return 0


def _load_prefix(pipe: Pipeline, args: argparse.Namespace) -> Prefix:
    """Load the prefix that the conversation begins with.

    Raises:
        ConfigError: the conversation begins with other tokens.
    """
    prefix = pipe.load_prefix(args.prefix)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    ids = pipe.tokenizer.encode_segments(pipe.tokenizer.template.beginning(messages)).tolist()
    if ids[: len(prefix)] != prefix.token_ids.tolist():
        raise ConfigError(
            f"--prefix {args.prefix} does not match the beginning of this conversation; give the --system text that "
            "the prefix was built from."
        )
    return prefix


def _save(chat: Chat, path: str) -> None:
    """Save the conversation and print the file and its size."""
    try:
        if not path:
            terminal.note("/save FILE: name the file to write the conversation to.")
        else:
            terminal.note(f"Saved to {path}, {chat.save(path) / 2**20:.1f} MiB.")
    except Error as exc:
        terminal.note(f"{type(exc).__name__}: {exc}")


def _ask() -> str | None:
    """Read the next message; None at the end of the input. Ctrl-C clears the line."""
    while True:
        try:
            return input("> ").strip()
        except KeyboardInterrupt:
            print()
            terminal.note("Ctrl-D or /quit leaves.")
        except EOFError:
            print()
            return None


def _turn(chat: Any, text: str, config: GenerationConfig) -> None:
    """Run one turn; an error ends the turn, not the chat."""
    try:
        bar = terminal.PrefillBar()
        result, _ = show(chat.stream(text, config, on_prefill=bar), bar)
        if result.dropped_messages:
            turns = sum(message["role"] == "assistant" for message in result.dropped_messages)
            dropped = "oldest turn was" if turns == 1 else f"{turns} oldest turns were"
            terminal.note(f"[the {dropped} dropped, to make room]")
        terminal.note(describe(result))
    except Error as exc:
        terminal.note(f"{type(exc).__name__}: {exc}")


def _rewind(chat: Any, arguments: list[str]) -> None:
    """Remove the last turns and print the last message that is left."""
    try:
        chat.rewind(int(arguments[0]) if arguments else 1)
    except ValueError as exc:  # ConfigError is a ValueError too
        terminal.note(str(exc) if isinstance(exc, Error) else f"/rewind {arguments[0]}: expected a number of turns.")
        return
    messages = [m["content"] for m in chat.messages if m["role"] == "user"]
    terminal.note(f"Back to after: {messages[-1]}" if messages else "Back to the beginning.")


def _usage(chat: Any) -> str:
    """The KV cache of a chat, in a line."""
    usage = chat.kv
    return (
        f"{usage.cached_tokens} of {len(chat.token_ids)} tokens cached ({usage.bytes / 2**20:.1f} MiB), "
        f"{usage.free_tokens} of {usage.context_length} free; the last turn reused {usage.reused_tokens}"
    )
