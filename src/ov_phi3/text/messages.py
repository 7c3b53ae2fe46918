"""Messages as OpenAI's chat API has them, brought into one form.

`normalize` is the only function that reads a caller's messages. Chat templates, conversations and tools take its
`ChatMessage` dicts, whose roles are known and whose content is one string. The roles, parts and keys are those of the
request schema of OpenAI's chat completions (`ChatCompletionRequestMessage`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from ov_phi3.errors import TemplateError, did_you_mean

__all__ = ["ROLES", "ChatMessage", "Message", "check_final", "normalize"]

Message = Mapping[str, Any]
"""A message as a caller gives it: `{"role": ..., "content": ...}`; content is a string, None for an assistant with
`tool_calls`, or a list of `{"type": "text", "text": ...}` parts."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles of a `ChatMessage`. A chat template may take more."""

_SAME_ROLE = {"developer": "system"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


class _Required(TypedDict):
    role: str
    content: str


class ChatMessage(_Required, total=False):
    """A message in its normal form. `normalize` returns it unchanged.

    Attributes:
        role: one of `ROLES`, or another role that the chat template takes; "developer" has become "system".
        content: the text; "" where the caller gave None.
        tool_calls: of an assistant: `{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}`.
            `arguments` is a dict; text that is no JSON object stays text.
        tool_call_id: of a tool's message: the id of the call that it answers.
        name: of a tool's message: the name of the function.
        tools: of a system message, for chat templates that write the tools there.
    """

    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    tools: Any


_READ_KEYS = {
    "system": ("role", "content", "tools"),
    "assistant": ("role", "content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
_LEAST_KEYS = ("role", "content")


def normalize(messages: Sequence[Message], roles: Iterable[str] = (), *, first: int = 0) -> list[ChatMessage]:
    """Bring messages into one form.

    Keys that say nothing to the model (`name`, `metadata`, `refusal`, ...) are left out of the result.

    Args:
        messages: the messages as the caller gave them.
        roles: roles that are accepted besides `ROLES` and "developer".
        first: index of the first message, for error messages.

    Raises:
        TemplateError: an unknown role, a missing or unknown content, or a `tool_calls` that is not OpenAI's; the error
            names the message by its index.
        TypeError: `messages` is not a sequence of mappings.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}")
    extra = tuple(roles)
    return [_normal(message, f"messages[{index}]", extra) for index, message in enumerate(messages, first)]


def check_final(messages: Sequence[ChatMessage], *, continue_final_message: bool) -> None:
    """Check that a reply can follow the last message, or continue it.

    Raises:
        TemplateError: the last message is the assistant's and is not to be continued; or it is to be continued, and is
            not the assistant's, or has tool calls.
    """
    last = len(messages) - 1
    ends_with_assistant = bool(messages) and messages[last]["role"] == "assistant"
    if not continue_final_message:
        if ends_with_assistant:
            raise TemplateError(
                f"messages[{last}], the last one, has the role 'assistant', so nothing is left to answer. Give "
                "continue_final_message=True to go on with that message, or append a user message."
            )
        return
    if not ends_with_assistant:
        role = f"the last message has the role {messages[last]['role']!r}" if messages else "there is no message"
        raise TemplateError(f"continue_final_message=True goes on with the assistant's last message, but {role}.")
    if messages[last].get("tool_calls"):
        raise TemplateError(
            f"continue_final_message=True cannot go on with messages[{last}]: it has tool_calls, which end a message."
        )


def _normal(message: Message, label: str, extra_roles: tuple[str, ...]) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise TypeError(f"{label} must be a dict with 'role' and 'content', not {type(message).__name__}")
    role = _role(message, label, extra_roles)
    read = _READ_KEYS.get(role, _LEAST_KEYS)
    _check_misspelt(message, read, label)
    calls = _tool_calls(message.get("tool_calls"), label) if role == "assistant" else []
    normal = ChatMessage(role=role, content=_content(message, role, label, optional=bool(calls)))
    if calls:
        normal["tool_calls"] = calls
    if role == "tool":
        if message.get("tool_call_id") is not None:
            normal["tool_call_id"] = _string(message["tool_call_id"], f"{label}: tool_call_id")
        if message.get("name") is not None:
            normal["name"] = _string(message["name"], f"{label}: name")
    if role == "system" and message.get("tools") is not None:
        normal["tools"] = message["tools"]
    return normal


def _role(message: Message, label: str, extra: tuple[str, ...]) -> str:
    if "role" not in message:
        raise TemplateError(f"{label} has no 'role', but {sorted(map(str, message))}.{_nearest_key(message, 'role')}")
    role = message["role"]
    known = tuple(dict.fromkeys((*_KNOWN_ROLES, *extra)))
    if not isinstance(role, str) or role not in known:
        raise TemplateError(
            f"{label} has the role {role!r}; expected one of {list(known)}.{did_you_mean(str(role), known)}"
        )
    return _SAME_ROLE.get(role, str(role))


def _check_misspelt(message: Message, read: Iterable[str], label: str) -> None:
    """Refuse a key that looks like one which the message lacks: it would be left out without a word."""
    for name in read:
        if name not in message and name != "name" and (hint := _nearest_key(message, name)):
            raise TemplateError(f"{label} has no {name!r}.{hint}")


def _nearest_key(message: Message, name: str) -> str:
    """A sentence about a key of the message that is close to `name`; '' if none is."""
    others = [str(key) for key in message if key not in ("role", "content", "name")]
    closest = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f" It has {closest[0]!r}: did you mean {name!r}?" if closest else ""


def _content(message: Message, role: str, label: str, *, optional: bool) -> str:
    """A message's content as one string."""
    content = message.get("content")
    if content is None:
        if optional:
            return ""
        if role == "assistant" and isinstance(refusal := message.get("refusal"), str):
            return str(refusal)  # OpenAI's answers have it in place of a content
        if "content" not in message:
            raise TemplateError(f"{label} has no 'content', but {sorted(map(str, message))}.")
        raise TemplateError(f"{label}: content is None, which only an assistant's message with tool_calls may have.")
    if isinstance(content, str):
        return str(content)
    if isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        return "".join(_part_text(part, role, label) for part in content)
    raise TemplateError(f"{label}: content must be a string or a list of text parts, not {type(content).__name__}.")


def _part_text(part: object, role: str, label: str) -> str:
    """The text of one part of a content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    kinds = ("text", "refusal") if role == "assistant" else ("text",)
    text = part.get(kind) if isinstance(part, Mapping) and kind in kinds else None  # each kind names the text's key
    if not isinstance(text, str):
        raise TemplateError(f"{label}: a content part must be {{'type': 'text', 'text': str}}, not {part!r}.")
    return str(text)


def _tool_calls(value: object, label: str) -> list[dict[str, Any]]:
    """An assistant's tool calls, with parsed arguments; [] for None."""
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TemplateError(f"{label}: tool_calls must be a list, not {type(value).__name__}.")
    return [_tool_call(call, f"{label}: tool_calls[{index}]") for index, call in enumerate(value)]


def _tool_call(call: object, label: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        form = "{'id': ..., 'type': 'function', 'function': {'name': ..., 'arguments': ...}}"
        raise TemplateError(f"{label} must be {form}, not {call!r}.")
    if call.get("type", "function") != "function":
        raise TemplateError(f"{label} has the type {call['type']!r}; expected 'function'.")
    name = _string(function.get("name"), f"{label}: the function's name")
    normal: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": _arguments(function, label)}}
    if call.get("id") is not None:
        normal = {"id": _string(call["id"], f"{label}: id"), **normal}
    return normal


def _arguments(function: Mapping[str, Any], label: str) -> dict[str, Any] | str:
    """The arguments as a dict; a text that is no JSON object, as a model may have written it, stays text."""
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    text = _string(arguments, f"{label}: arguments")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text


def _string(value: object, label: str) -> str:
    if not isinstance(value, str):
        raise TemplateError(f"{label} must be a string, not {value!r}.")
    return str(value)
