"""A conversation at the terminal: its turns, its options, and what the commands do to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.registry import backend_spec
from ov_phi3.cli import preflight
from ov_phi3.cli.commands import COMMANDS, SYNONYMS, option_name, option_value
from ov_phi3.cli.keyboard import keyboard_off
from ov_phi3.cli.replies import describe, print_logprobs, show
from ov_phi3.cli.terminal import PrefillBar, wrapped_note, wrapped_notes
from ov_phi3.cli.words import in_flags
from ov_phi3.errors import ConfigError, ContextOverflowError, Error
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.contradictions import check_resolved
from ov_phi3.generation.validation import BOOLEANS

if TYPE_CHECKING:
    from ov_phi3.chat import Chat
    from ov_phi3.cli.replies import Printer
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.pipeline import Pipeline

__all__ = ["LOOP", "MOST_TOKENS", "Session"]

MOST_TOKENS = 1024
"""Tokens of a reply without a limit of its own, as long as they are at most a quarter of the context window."""
_SEVERAL_REPLIES = ("num_beams", "num_return_sequences")
LOOP = (64, 16)
"""`stop_on_loop` of a chat. Fewer repeats would cut short what rightly repeats itself, such as a row of zeros."""


@dataclass
class Session:
    """One chat after another on one pipeline.

    Attributes:
        pipe: the loaded model.
        printer: prints the replies.
        options: options of the replies, by name.
        chat: the conversation.
        help: how messages are typed.
        properties: OpenVINO properties of the command line.
    """

    pipe: Pipeline
    printer: Printer
    options: dict[str, Any]
    chat: Chat
    help: str = ""
    properties: dict[str, Any] = field(default_factory=dict)
    _failed: str | None = None  # the last message, if its turn is not part of the conversation

    def __post_init__(self) -> None:
        self._initial = dict(self.options)

    # -- turns -------------------------------------------------------------------------------------------------------

    def turn(self, text: str) -> None:
        """Run one turn; an error ends the turn, not the chat."""
        self._failed = text
        try:
            bar = PrefillBar()
            with keyboard_off():
                result, _ = show(self._stream(text, bar), bar, self.printer)
        except Error as exc:
            self._say_error(exc)
            return
        if result.token_ids:
            self._failed = None
        if result.dropped_messages:
            turns = sum(message["role"] == "assistant" for message in result.dropped_messages)
            dropped = "oldest turn was" if turns == 1 else f"{turns} oldest turns were"
            wrapped_note(f"[the {dropped} dropped, to make room]")
        if result.logprobs:
            print_logprobs(result.logprobs)
        wrapped_note(describe(result))

    def _stream(self, text: str, bar: PrefillBar) -> TokenStream:
        config = GenerationConfig(**self.options)
        limited = self._is_limited
        if limited:
            config = config.replace(max_new_tokens=min(MOST_TOKENS, max(1, self.pipe.context_length // 4)))
        try:
            return self.chat.stream(text, config, on_prefill=bar)
        except ContextOverflowError:
            if not limited:
                raise
        return self.chat.stream(text, GenerationConfig(**self.options), on_prefill=bar)  # as long as there is room

    @property
    def _is_limited(self) -> bool:
        """Whether the chat's own limit holds: nobody has given another one, or turned it off."""
        given = GenerationConfig(**self.options).merged_over(self.pipe.defaults)
        return "max_new_tokens" not in self.options and given.max_new_tokens is None and given.max_length is None

    # -- commands ----------------------------------------------------------------------------------------------------

    def run(self, text: str) -> bool:
        """Run a command; False if it ends the chat. Errors are printed."""
        name, _, argument = text.partition(" ")
        name = SYNONYMS.get(name, name)
        if name == "/exit":
            return False
        if name not in COMMANDS:
            wrapped_note(f"{name} is not a command; /help lists them. A message that begins with / is typed as //.")
            return True
        try:
            getattr(self, f"_{name[1:]}")(argument.strip())
        except (Error, TypeError) as exc:
            self._say_error(exc)
        return True

    def _say_error(self, exc: Exception) -> None:
        message = in_flags(str(exc), {"backend": "--backend", "ov_config": "--ov-config"})
        wrapped_note(f"{type(exc).__name__}: {message}")

    def _help(self, _: str) -> None:
        usages = {f"{name} {command.arguments}".rstrip(): command.meaning for name, command in COMMANDS.items()}
        wrapped_notes(usages)
        wrapped_note("//text sends a message that begins with a slash. Ctrl-C stops a reply.")
        wrapped_note(self.help)

    def _clear(self, _: str) -> None:
        self._begin(self._system_messages())
        wrapped_note("A new conversation.")

    def _retry(self, _: str) -> None:
        before, text = self.chat, self._failed
        if text is None:
            users = [message["content"] for message in self.chat.messages if message["role"] == "user"]
            if not users:
                raise ConfigError("there is no reply yet to generate again.")
            text = users[-1]
            before = self.chat.fork()
            self.chat.rewind()
        if not GenerationConfig(**self.options).merged_over(self.pipe.defaults).samples:
            wrapped_note("The reply is greedy, so it will be the same; /set temperature 0.7 samples.")
        self.turn(text)
        if self._failed is not None:  # the earlier reply is better than none
            self.chat = before

    def _system(self, text: str) -> None:
        if not text:
            system = "\n\n".join(str(message["content"]) for message in self._system_messages())
            wrapped_note(f"System message: {system}" if system else "There is no system message.")
            return
        rest = [message for message in self.chat.messages if message["role"] != "system"]
        self._begin([*([] if text == "none" else [{"role": "system", "content": text}]), *rest])
        wrapped_note("The system message is removed." if text == "none" else "The system message is set.")

    def _show(self, _: str) -> None:
        for message in self.chat.messages:
            wrapped_note(f"{message['role']}: {message['content']}")
        wrapped_note(f"{self.pipe.info.path} on {self.pipe.device}, {self.pipe.load_report.backend}")
        wrapped_note(self._usage())
        self._say_options()

    def _save(self, path: str) -> None:
        if not path:
            raise ConfigError("name the file: /save FILE.")
        wrapped_note(f"Saved to {path}, {self.chat.save(path) / 2**20:.1f} MiB.")

    def _load(self, path: str) -> None:
        if not path:
            raise ConfigError("name the file: /load FILE.")
        self.load(path)

    def load(self, path: str) -> None:
        """Continue a saved conversation.

        Raises:
            SnapshotError: it cannot be used.
        """
        chat = self.pipe.load_chat(path)
        chat.overflow = self.chat.overflow
        self.chat, self._failed = chat, None
        wrapped_note(f"{len(chat.messages)} messages, {self._usage()}")

    def _rewind(self, argument: str) -> None:
        try:
            turns = int(argument or "1")
        except ValueError:
            raise ConfigError(f"/rewind {argument}: expected a number of turns.") from None
        self.chat.rewind(turns)
        self._failed = None
        messages = [message["content"] for message in self.chat.messages if message["role"] == "user"]
        wrapped_note(f"Back to after: {messages[-1]}" if messages else "Back to the beginning.")

    def _kv(self, _: str) -> None:
        wrapped_note(self._usage())

    def _set(self, argument: str) -> None:
        word, _, text = argument.partition(" ")
        if not word:
            self._say_options()
            return
        name, text = option_name(word), text.strip()
        if not text:
            wrapped_note(
                f"{name} {self.options[name]!r}" if self.options.get(name) is not None else f"{name} is not set."
            )
            return
        options = {**self.options}
        options.pop(name, None)
        if text == "default":
            options.update({name: self._initial[name]} if name in self._initial else {})
        else:
            options[name] = None if text == "off" and name not in BOOLEANS else option_value(name, text)
        if name in _SEVERAL_REPLIES:
            preflight.check_streams(GenerationConfig(**{name: options.get(name)}))
        self._check(options)
        self.options = options
        self._say_options()

    def _check(self, options: dict[str, Any]) -> None:
        """Check options as they will be used, so that a wrong one is named now and not by every turn."""
        config = GenerationConfig(**options)
        preflight.check_streams(config)
        preflight.check_fits(config, self.pipe.context_length, self.pipe.info.vocab_size)
        resolved = config.resolve(self.pipe.defaults, room=self.pipe.context_length)
        check_resolved(resolved)
        problem = backend_spec(self.pipe.load_report.backend).unsupported(resolved, self.properties)
        if problem is not None:
            raise ConfigError(problem)

    def _say_options(self) -> None:
        given = [f"{name} {value!r}" for name, value in self.options.items() if value is not None]
        if self._is_limited:
            given.append(f"max_new_tokens {min(MOST_TOKENS, self.pipe.context_length // 4)} (/set max_new_tokens N)")
        wrapped_note(f"Options: {', '.join(given) or 'the defaults'}.")

    def _begin(self, messages: list[dict[str, Any]]) -> None:
        self.chat = self.pipe.chat(messages=messages or None, overflow=self.chat.overflow)
        self._failed = None

    def _system_messages(self) -> list[dict[str, Any]]:
        return [message for message in self.chat.messages if message["role"] == "system"]

    def _usage(self) -> str:
        """The KV cache of the chat, in a line."""
        usage = self.chat.kv
        return (
            f"{usage.cached_tokens} of {len(self.chat.token_ids)} tokens cached ({usage.bytes / 2**20:.1f} MiB), "
            f"{usage.free_tokens} of {usage.context_length} free; the last turn reused {usage.reused_tokens}"
        )
