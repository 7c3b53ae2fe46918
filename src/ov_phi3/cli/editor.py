"""The editor for messages, with the package `prompt_toolkit`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

from ov_phi3.cli import terminal
from ov_phi3.cli.commands import LEAVES, PROMPT
from ov_phi3.cli.state import history_file

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.key_binding import KeyPressEvent

    from ov_phi3.cli.commands import Completions

__all__ = ["Editor"]


class Editor:
    """Reads messages: Enter sends, Alt-Enter and Ctrl-J begin a line, and pasted text stays as it is.

    Args:
        completions: what can be completed.
    """

    help = "Enter sends, Alt-Enter or Ctrl-J begins a new line, Tab completes, the up arrow shows earlier messages."

    def __init__(self, completions: Completions) -> None:
        file = history_file()
        history: History = InMemoryHistory() if file is None else FileHistory(str(file))
        self._session: PromptSession[str] = PromptSession(
            HTML(f"<b>{PROMPT.replace('>', '&gt;')}</b>"),
            multiline=True,
            prompt_continuation=lambda *_: " " * len(PROMPT),
            history=history,
            completer=_Completer(completions),
            complete_while_typing=True,
            key_bindings=_keys(),
            reserve_space_for_menu=4,
        )

    def read(self) -> str | None:
        """The next message; Ctrl-C drops what was typed."""
        while True:
            try:
                return self._session.prompt()
            except KeyboardInterrupt:
                terminal.note(LEAVES)
            except EOFError:
                return None


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Completer(Completer):
    """Commands, options and their values, and paths, in a message that begins with a slash."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What the last word can become."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, argument = text.partition(" ")
        if space and command in self._completions.with_path:
            yield from self._paths.get_completions(Document(argument), complete_event)
            return
        word = text.split(" ")[-1]
        for value, meaning in self._completions.after(text):
            if value.startswith(word) and value != word:
                yield Completion(value, start_position=-len(word), display_meta=meaning)
