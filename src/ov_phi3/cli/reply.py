"""`ov-phi3 generate` and `ov-phi3 chat`: replies streamed to the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.cli import terminal
from ov_phi3.cli.options import add_generation_options, generation_config
from ov_phi3.errors import ConfigError, Error

if TYPE_CHECKING:
    from ov_phi3.chat import Chat
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.generation.results import GenerationResult
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix

__all__ = ["add_chat", "add_generate"]

_HELP = (
    "Commands: /rewind [N] removes the last turns, /kv shows the KV cache, /save FILE saves the conversation, "
    "/reset starts over, /quit leaves, /help shows this. Ctrl-C stops a reply, Ctrl-D leaves."
)


def add_generate(commands: Any) -> None:
    """Add the `generate` command."""
    parser = commands.add_parser("generate", help="one reply to one prompt", description="One reply to one prompt.")
    terminal.add_load_arguments(parser)
    # Required: argparse cannot tell an optional prompt after a flag from a stray argument.
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument("--system", help="a system message")
    parser.add_argument(
        "--prefix", type=Path, metavar="FILE", help="saved KV cache to continue from, made by `ov-phi3 cache build`"
    )
    parser.add_argument(
        "--raw", action="store_true", help="apply no chat template to the prompt, and parse its control tokens"
    )
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON instead of streaming text")
    add_generation_options(parser)
    parser.set_defaults(run=_generate)


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


def _generate(args: argparse.Namespace) -> int:
    import ov_phi3

    config = generation_config(args)  # before loading, so that a wrong option fails at once
    if args.raw and args.system is not None:
        raise ConfigError("--raw and --system contradict each other: a raw prompt has its own system message.")
    text = (sys.stdin.read() if sys.stdin else "") if args.prompt == "-" else args.prompt
    prompt: Any = ov_phi3.Raw(text) if args.raw else text
    if args.prefix is not None and args.system is not None:
        raise ConfigError("--prefix and --system contradict each other: the prefix holds the system message already.")
    if args.system is not None:
        prompt = [{"role": "system", "content": args.system}, {"role": "user", "content": text}]
    with terminal.load(args, _backend_for(config, args.prefix)) as pipe:
        prefix = None if args.prefix is None else pipe.load_prefix(args.prefix)
        if args.json:
            result = pipe.generate(prompt, config, prefix=prefix)
            report = {**result.to_dict(), "device": pipe.device.name, "device_name": pipe.device.full_name}
            print(json.dumps(report, indent=2))
            return 0
        if config.is_multi_sequence:
            result, interrupted = pipe.generate(prompt, config, prefix=prefix), False
            print(result.text)
        else:
            bar = terminal.PrefillBar()
            result, interrupted = _show(pipe.stream(prompt, config, on_prefill=bar, prefix=prefix), bar)
        terminal.note(_latency(result))
    return 130 if interrupted else 0


def _chat(args: argparse.Namespace) -> int:
    config = generation_config(args)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - adds history and line editing to input()
    with terminal.load(args, _backend_for(config, args.prefix or args.load)) as pipe:
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


def _backend_for(config: GenerationConfig, file: Path | None) -> str:
    """The backend that supports the given options and files."""
    return "infer_request" if file is not None or config.infer_request_options else "llm_pipeline"


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
        result, _ = _show(chat.stream(text, config, on_prefill=bar), bar)
        if result.dropped_messages:
            turns = sum(message["role"] == "assistant" for message in result.dropped_messages)
            dropped = "oldest turn was" if turns == 1 else f"{turns} oldest turns were"
            terminal.note(f"[the {dropped} dropped, to make room]")
        terminal.note(_latency(result))
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


def _show(stream: TokenStream, bar: terminal.PrefillBar) -> tuple[GenerationResult, bool]:
    """Print a reply while it streams; return the result and whether Ctrl-C stopped it."""
    interrupted = False
    with stream:
        try:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
            stream.cancel()
        finally:
            bar.clear()
        print(flush=True)
        return stream.result, interrupted


def _latency(result: GenerationResult) -> str:
    """The line with the latency of a reply."""
    ending = {"length": "; ended at its length limit", "cancelled": "; stopped", "loop": "; ended in a loop"}.get(
        result.finish_reason, ""
    )
    return f"[{result.metrics}{ending}]"
