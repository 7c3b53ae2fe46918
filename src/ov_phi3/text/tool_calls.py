"""Calls of tools in the text of a reply: found while it is generated, and hidden from what is shown.

A call is `{"name": ..., "arguments": {...}}`, alone or in a list. It stands at the start of the reply or behind another
call, or anywhere behind one of the two marks of Phi-4-mini, `<|tool_call|>[...]<|/tool_call|>` and `functools[...]`.
Text that looks like a call and is none (an unknown name, or JSON that is not of that form) stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CALL_END", "CALL_START", "ToolCall", "ToolCallParser"]

CALL_START, CALL_END = "<|tool_call|>", "<|/tool_call|>"
"""Phi-4-mini's control tokens around a list of calls."""

_MARKS = (CALL_START, "functools[")
_FIRST_KEYS = ("name", "arguments", "parameters")


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, as a reply asks for it.

    Attributes:
        id: unique; the message with the tool's result names it as `tool_call_id`.
        name: name of the function.
        arguments: its arguments. With `tool_choice="required"` or a named function they obey the function's schema;
            with "auto" they are what the model wrote.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=_new_id)

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's API has it, for the `tool_calls` of an assistant's message; `arguments` is JSON text."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ToolCallParser:
    """Split text that comes in chunks into text and calls.

    What may become a call is held back until it is a call or can no longer be one. Without calls, the results of all
    `add` calls and of `flush`, joined, equal the input. White space around calls is left out.

    Args:
        names: names of the functions that can be called.

    Attributes:
        calls: all calls so far.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.calls: list[ToolCall] = []
        self._names = frozenset(names)
        self._held = ""  # not shown yet
        self._bare = True  # a call without a mark may begin here: at the start, and behind a call
        self._json: _JsonEnd | None = None  # of the candidate that `_held` begins with

    def add(self, chunk: str) -> str:
        """Take the next chunk; return the text that can be shown now."""
        self._held += chunk
        shown = ""
        while (step := self._step()) is not None:
            shown += step
        return shown

    def flush(self) -> str:
        """Return the text that was held back at the end of the reply, which was not a call."""
        held, self._held, self._json = self._held, "", None
        return "" if self.calls and not held.strip() else held

    def _step(self) -> str | None:
        """Look at the held text once; the text to show, or None if nothing can be decided without more of it."""
        if self._json is not None:
            return self._candidate(self._json)
        if self._bare:
            return self._call_or_text()
        starts = [start for mark in _MARKS if (start := self._held.find(mark)) >= 0]
        if starts:
            shown, self._held = self._held[: min(starts)], self._held[min(starts) :]
            self._json = _JsonEnd(_mark_length(self._held))
            return shown
        keep = _partial_mark(self._held)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown or None

    def _call_or_text(self) -> str | None:
        """The start of the reply, or of what follows a call: a call, or text from here on."""
        text = self._held.lstrip()
        if self.calls:
            self._held = text
            if text.startswith(CALL_END):
                self._held = text.removeprefix(CALL_END)
                return ""
        if not text or (self.calls and CALL_END.startswith(text)):
            return None
        if may_call := _begins_as_call(text):
            self._json = _JsonEnd(0)
        elif may_call is None:
            return None
        self._bare = bool(may_call)
        return ""

    def _candidate(self, json_end: _JsonEnd) -> str | None:
        """Go on with a candidate: note its calls, or return its text once it is known to be none."""
        end = json_end.find(self._held)
        if end is None:
            return None
        calls = self._parse(self._held[_mark_length(self._held) : end]) if end else None
        self._json = None
        if calls is None:
            cut = end or 1  # the text behind the mark's first character may hold another mark
            shown, self._held, self._bare = self._held[:cut], self._held[cut:], False
            return shown
        self.calls += calls
        self._held, self._bare = self._held[end:], True
        return ""

    def _parse(self, text: str) -> list[ToolCall] | None:
        """The calls of a JSON text; None if it is not calls of known functions."""
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return None
        rows = value if isinstance(value, list) else [value]
        calls = [self._call(row) for row in rows]
        return [call for call in calls if call is not None] if calls and None not in calls else None

    def _call(self, row: object) -> ToolCall | None:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or row["name"] not in self._names:
            return None
        arguments = row["arguments"] if "arguments" in row else row.get("parameters", {})
        return ToolCall(row["name"], arguments) if isinstance(arguments, dict) else None


class _JsonEnd:
    """Finds the end of a JSON list or object in text that grows, in time linear in its length.

    Args:
        start: where it may begin, behind white space.
    """

    def __init__(self, start: int) -> None:
        self._position = start
        self._depth = 0
        self._in_string = False

    def find(self, text: str) -> int | None:
        """Its end; 0 if the text is no list and no object; None while it is incomplete."""
        while self._position < len(text):
            char = text[self._position]
            if self._in_string and char == "\\":
                if self._position + 1 == len(text):
                    return None
                self._position += 1
            elif char == '"' and self._depth:
                self._in_string = not self._in_string
            elif not self._in_string and char in "[{":
                self._depth += 1
            elif not self._in_string and char in "]}" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return self._position + 1
            elif not self._depth and not char.isspace():
                return 0
            self._position += 1
        return None


def _mark_length(text: str) -> int:
    """Length of the mark at the start of a candidate; the bracket behind `functools` belongs to the JSON."""
    return next((len(mark.rstrip("[")) for mark in _MARKS if text.startswith(mark)), 0)


def _partial_mark(text: str) -> int:
    """Length of the longest end of `text` that is the start of a mark."""
    lengths = range(min(max(map(len, _MARKS)) - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in _MARKS)), 0)


def _begins_as_call(text: str) -> bool | None:
    """Whether a text begins as a call without a mark does; None if more of it is needed."""
    compact = "".join(text.split())  # a reply held to a schema may have any amount of white space
    openings = [f'{bracket}"{key}":' for bracket in ("[{", "{") for key in _FIRST_KEYS]
    if any(compact.startswith(opening) for opening in openings):
        return True
    return None if any(opening.startswith(compact) for opening in openings) else False
