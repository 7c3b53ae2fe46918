"""`ov-phi3 generate` and `ov-phi3 chat`: replies that stream into the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.cli import terminal
from ov_phi3.errors import ConfigError, Error
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.validation import BOOLEANS, INTEGERS, NUMBERS

if TYPE_CHECKING:
    from ov_phi3.chat import Chat
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.generation.results import GenerationResult
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix

__all__ = ["add_chat", "add_generate"]

_HELP = (
    "Commands: /rewind [N] takes back the last turns, /kv tells what is cached, /save FILE saves the conversation, "
    "/reset starts over, /quit leaves, /help shows this. Ctrl-C stops a reply, Ctrl-D leaves."
)


def add_generate(commands: Any) -> None:
    """Add the `generate` command."""
    parser = commands.add_parser("generate", help="one reply to one prompt", description="One reply to one prompt.")
    terminal.add_load_arguments(parser)
    # Required, as argparse cannot tell an optional one that stands behind a flag from a stray argument.
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--prefix", type=Path, metavar="FILE", help="what the prompt follows, by `ov-phi3 cache build`")
    parser.add_argument("--raw", action="store_true", help="the prompt is laid out already: parse its control tokens")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON instead of streaming text")
    _add_options(parser)
    parser.set_defaults(run=_generate)


def add_chat(commands: Any) -> None:
    """Add the `chat` command."""
    parser = commands.add_parser("chat", help="a conversation", description=f"A conversation. {_HELP}")
    terminal.add_load_arguments(parser)
    parser.add_argument("--system", help="a system message")
    parser.add_argument(
        "--prefix", type=Path, metavar="FILE", help="the system message, prefilled by `ov-phi3 cache build`"
    )
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument(
        "--overflow",
        choices=["drop_oldest", "error"],
        default="drop_oldest",
        help="for a turn that no longer fits: drop the oldest ones, or refuse it (default: %(default)s)",
    )
    _add_options(parser)
    parser.set_defaults(run=_chat)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for every option of a reply that a flag can hold, with the help of the library's own docstring."""
    group = parser.add_argument_group("generation options (default: the model's own)")
    about = dict(re.findall(r"^        (\w+): (.+)", GenerationConfig.__doc__ or "", re.MULTILINE))
    for name in GenerationConfig.__dataclass_fields__:
        if name == "logits_processors":  # functions
            continue
        flag = "--" + name.replace("_", "-")
        text = about.get(name, "").rstrip(".;").replace("%", "%%")
        if name in BOOLEANS:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif name == "stop":
            group.add_argument(flag, action="append", metavar="TEXT", help=text + "; can be given several times")
        elif name == "logit_bias":
            group.add_argument(flag, action="append", metavar="ID=BIAS", help=text + "; can be given several times")
        elif name == "stop_token_ids":
            group.add_argument(flag, type=int, nargs="+", metavar="ID", help=text)
        else:
            kind: Any = str
            if name in INTEGERS:
                kind = int
            elif name in NUMBERS:
                kind = float
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, metavar=metavar, help=text)


def _options(args: argparse.Namespace) -> GenerationConfig:
    given = {name: getattr(args, name, None) for name in GenerationConfig.__dataclass_fields__}
    if args.logit_bias is not None:
        given["logit_bias"] = dict(_bias(pair) for pair in args.logit_bias)
    return GenerationConfig(**given)


def _bias(pair: str) -> tuple[int, float]:
    token, _, bias = pair.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as exc:
        raise ConfigError(f"--logit-bias {pair!r}; expected ID=BIAS, a token id and a number.") from exc


def _generate(args: argparse.Namespace) -> int:
    import ov_phi3

    config = _options(args)  # before the model is loaded: a wrong option should not take seconds to be told
    if args.raw and args.system is not None:
        raise ConfigError("--raw and --system contradict each other: a raw prompt has its own system turn.")
    text = (sys.stdin.read() if sys.stdin else "") if args.prompt == "-" else args.prompt
    prompt: Any = ov_phi3.Raw(text) if args.raw else text
    if args.prefix is not None and args.system is not None:
        raise ConfigError(
            "--prefix and --system contradict each other: the prompt follows the prefix, system turn and all."
        )
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
    config = _options(args)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and line editing
    with terminal.load(args, _backend_for(config, args.prefix or args.load)) as pipe:
        prefix = None if args.prefix is None else _held(pipe, args)  # noqa: F841 - used for as long as it is held
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
                terminal.note(_HELP if text == "/help" else f"{text.split()[0]} is no command. {_HELP}")
            elif text:
                _turn(chat, text, config)
    return 0


def _backend_for(config: GenerationConfig, file: Path | None) -> str:
    """The backend that has what was asked for."""
    return "infer_request" if file is not None or config.infer_request_options else "llm_pipeline"


def _held(pipe: Pipeline, args: argparse.Namespace) -> Prefix:
    """The prefix that the conversation begins with."""
    prefix = pipe.load_prefix(args.prefix)
    head = [] if args.system is None else [{"role": "system", "content": args.system}]
    begins = pipe.tokenizer.encode_segments(pipe.tokenizer.template.beginning(head)).tolist()
    if begins[: len(prefix)] != prefix.token_ids.tolist():
        raise ConfigError(
            f"--prefix {args.prefix} is not what this conversation begins with; give the --system that it was built of."
        )
    return prefix


def _save(chat: Chat, path: str) -> None:
    """Save a conversation; says where, and how large it is."""
    try:
        if not path:
            terminal.note("/save FILE: a file to write the conversation to.")
        else:
            terminal.note(f"Saved to {path}, {chat.save(path) / 2**20:.1f} MiB.")
    except Error as exc:
        terminal.note(f"{type(exc).__name__}: {exc}")


def _ask() -> str | None:
    """The next message, or None when there are no more; Ctrl-C only clears the line."""
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
    """One turn; what goes wrong in it ends the turn and not the chat."""
    try:
        bar = terminal.PrefillBar()
        result, _ = _show(chat.stream(text, config, on_prefill=bar), bar)
        if result.dropped_messages:
            turns = len(result.dropped_messages) // 2
            gone = "oldest turn was" if turns == 1 else f"{turns} oldest turns were"
            terminal.note(f"[the {gone} dropped, to make room]")
        terminal.note(_latency(result))
    except Error as exc:
        terminal.note(f"{type(exc).__name__}: {exc}")


def _rewind(chat: Any, arguments: list[str]) -> None:
    """Take back turns; says what the last one left is."""
    try:
        chat.rewind(int(arguments[0]) if arguments else 1)
    except ValueError as exc:  # ours is one, too
        terminal.note(str(exc) if isinstance(exc, Error) else f"/rewind {arguments[0]}: expected a number of turns.")
        return
    said = [m["content"] for m in chat.messages if m["role"] == "user"]
    terminal.note(f"Back to after: {said[-1]}" if said else "Back to the beginning.")


def _usage(chat: Any) -> str:
    """What a chat has in the KV cache, in a line."""
    usage = chat.kv
    return (
        f"{usage.cached_tokens} of {len(chat.token_ids)} tokens cached ({usage.bytes / 2**20:.1f} MiB), "
        f"{usage.free_tokens} of {usage.context_length} free; the last turn reused {usage.reused_tokens}"
    )


def _show(stream: TokenStream, bar: terminal.PrefillBar) -> tuple[GenerationResult, bool]:
    """Print a reply as it comes; Ctrl-C stops the reply, and what came of it is the result."""
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
    """The line of latency under a reply."""
    ended = {"length": "; ended at its length limit", "cancelled": "; stopped"}.get(result.finish_reason, "")
    return f"[{result.metrics}{ended}]"
