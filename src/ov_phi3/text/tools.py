"""Tools that a reply may call: checked, described to the model, and as the JSON schema of a reply that must call them.

Phi-4-mini has control tokens for tools, and its chat template a place for them. For every other chat template, tools,
calls and results are written as text, in the form that `docs/tools.md` documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ov_phi3.errors import ConfigError, did_you_mean
from ov_phi3.text.messages import ChatMessage
from ov_phi3.text.tool_calls import ToolCall, ToolCallParser

__all__ = ["ToolChoice", "Tools", "calls_as_json", "calls_of", "name_results", "written_out"]

ToolChoice: TypeAlias = Literal["auto", "none", "required"] | Mapping[str, Any]
"""Whether a reply calls tools: "auto", "none", "required", or a function as
`{"type": "function", "function": {"name": ...}}`."""

_CHOICES = ("auto", "none", "required")
_MOST_CALLS = 8
"""Most calls in a reply that must call tools, so that the list ends."""

_LARGEST = 2**53 - 1
"""Largest integer that every JSON reader keeps exactly (RFC 8259, section 6). Without it, digits may never end."""

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const")
_DATA = ("enum", "const", "default", "examples")

_INSTRUCTIONS = (
    "You can call these functions.\n"
    "Each has a name, a description and a JSON schema of its parameters:\n"
    "{functions}\n"
    "To call functions, answer with a JSON list of calls and nothing else:\n"
    '[{{"name": "<name of the function>", "arguments": {{"<parameter>": <value>}}}}]\n'
    "The results follow in the next messages. Otherwise, answer in plain text."
)


@dataclass(frozen=True)
class Tools:
    """The tools of a request or a chat.

    Attributes:
        functions: the functions as plain dicts with "name", "description" (if there is one) and "parameters".
        choice: "auto", "none" or "required".
        only: name of the function that must be called; None for any.
    """

    functions: tuple[dict[str, Any], ...]
    choice: str = "auto"
    only: str | None = None

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice | None = None) -> Tools | None:
        """Check tools and a choice as OpenAI's API has them; None if there are no tools.

        Args:
            tools: `{"type": "function", "function": {...}}` dicts, or plain function dicts.
            choice: see `ToolChoice`; None is "auto".

        Raises:
            ConfigError: a tool without a name or parameters, two of the same name, or a choice that is none, names an
                unknown function, or needs tools where there are none.
            TypeError: `tools` is not a list of mappings.
        """
        if tools is None or (isinstance(tools, Sequence) and not tools):
            if choice not in (None, "auto", "none"):
                raise ConfigError(f"tool_choice={choice!r} needs tools: give tools=[...].")
            return None
        if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
            raise TypeError(f"tools must be a list of function definitions, not {type(tools).__name__}")
        functions = tuple(_function(tool, f"tools[{index}]") for index, tool in enumerate(tools))
        names = [function["name"] for function in functions]
        if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
            raise ConfigError(f"tools holds two functions with the name {twice!r}; each name must be unique.")
        return cls(functions).choosing(choice)

    def choosing(self, choice: ToolChoice | None) -> Tools:
        """The same tools with another choice.

        Raises:
            ConfigError: as `of`.
        """
        if choice is None or choice in _CHOICES:
            return Tools(self.functions, "auto" if choice is None else str(choice))
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(choice, Mapping) or choice.get("type") != "function" or not isinstance(name, str):
            form = "{'type': 'function', 'function': {'name': ...}}"
            raise ConfigError(f"tool_choice={choice!r}; expected 'auto', 'none', 'required' or {form}.")
        if name not in self.names:
            known = list(self.names)
            raise ConfigError(
                f"tool_choice names the function {name!r}, but tools holds {known}.{did_you_mean(name, known)}"
            )
        return Tools(self.functions, "required", name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all functions."""
        return tuple(function["name"] for function in self.functions)

    def parser(self) -> ToolCallParser | None:
        """A parser for one reply; None if calls are not wanted."""
        return None if self.choice == "none" else ToolCallParser(self.names)

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema of a reply that must call tools; None if it need not."""
        if self.choice != "required":
            return None
        wanted = [f for f in self.functions if self.only in (None, f["name"])]
        definitions: dict[str, Any] = {}
        calls = [_call_schema(function, definitions) for function in wanted]
        schema: dict[str, Any] = {
            "type": "array",
            "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
            "minItems": 1,
            "maxItems": 1 if self.only else _MOST_CALLS,
        }
        return {**schema, "$defs": definitions} if definitions else schema

    def described(self, messages: Sequence[ChatMessage], *, native: bool, system: bool) -> list[ChatMessage]:
        """The messages with a description of the tools.

        Args:
            messages: the beginning of a conversation, in normal form.
            native: the chat template writes the key "tools" of a system message, as Phi-4-mini's does.
            system: the chat template has a system message; otherwise the first message holds the description.
        """
        first = messages[0] if messages else None
        role = "system" if system else "user"
        rest = list(messages[1:] if first is not None and first["role"] == role else messages)
        content = first["content"] if first is not None and first["role"] == role else ""
        if native:
            return [ChatMessage(role=role, content=content, tools=list(self.functions)), *rest]
        functions = "\n".join(json.dumps(function, ensure_ascii=False) for function in self.functions)
        text = _INSTRUCTIONS.format(functions=functions)
        parts = (content, text) if system else (text, content)
        return [ChatMessage(role=role, content="\n\n".join(part for part in parts if part)), *rest]


def _function(tool: object, label: str) -> dict[str, Any]:
    """One function as a plain dict."""
    if not isinstance(tool, Mapping):
        raise TypeError(f"{label} must be a dict, not {type(tool).__name__}")
    function = tool.get("function") if "function" in tool else tool
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        form = "{'type': 'function', 'function': {'name': ..., 'parameters': {...}}}"
        raise ConfigError(f"{label} is {tool!r}; expected {form}.")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{label} has the name {name!r}; a function needs a name.")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping):
        raise ConfigError(
            f"{label}, {name!r}, has the parameters {parameters!r}; expected a JSON schema, for a function without any "
            "{'type': 'object', 'properties': {}}."
        )
    if parameters.get("type", "object") != "object":
        raise ConfigError(f"{label}, {name!r}: parameters has the type {parameters['type']!r}; expected 'object'.")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise ConfigError(f"{label}, {name!r}: description must be a string, not {description!r}.")
    try:
        copied = json.loads(json.dumps(dict(parameters)))
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{label}, {name!r}: parameters cannot be written as JSON: {exc}.") from exc
    described = {"description": description} if description else {}
    return {"name": name, **described, "parameters": copied}


def _call_schema(function: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of a call; one with references goes to `definitions`, where they are made to point at it."""
    name, parameters = function["name"], {"type": "object", "properties": {}, **_bounded(function["parameters"])}
    if '"$ref"' in json.dumps(parameters):
        key = f"tool{len(definitions)}"
        definitions[key] = _rebased(parameters, f"#/$defs/{key}")
        parameters = {"$ref": f"#/$defs/{key}"}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _bounded(schema: Any) -> Any:
    """A schema whose integers without bounds are within those of `_LARGEST`."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {key: item if key in _DATA else _bounded(item) for key, item in schema.items()}
    kinds = schema.get("type")
    if (kinds == "integer" or kinds == ["integer", "null"]) and not any(key in schema for key in _BOUNDS):
        bounded |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    return bounded


def _rebased(value: Any, root: str) -> Any:
    """A schema whose references into itself begin at `root`."""
    if isinstance(value, list):
        return [_rebased(item, root) for item in value]
    if not isinstance(value, dict):
        return value
    rebased = {key: _rebased(item, root) for key, item in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        rebased["$ref"] = root + reference[1:]
    return rebased


# -- calls and results in messages -----------------------------------------------------------------------------------


def calls_of(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as an assistant's message in normal form has them."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def calls_as_json(message: ChatMessage) -> str:
    """The calls of an assistant's message as a JSON list."""
    return json.dumps([call["function"] for call in message.get("tool_calls", ())], ensure_ascii=False)


def name_results(messages: Sequence[ChatMessage], history: Sequence[ChatMessage] = ()) -> list[ChatMessage]:
    """The messages, with the name of the function in each result whose call is among them or in the history."""
    names: dict[str, str] = {}
    named: list[ChatMessage] = []
    for index, given in enumerate((*history, *messages)):
        message = given
        for call in message.get("tool_calls", ()):
            if "id" in call:
                names[call["id"]] = call["function"]["name"]
        name = names.get(message.get("tool_call_id", ""))
        if message["role"] == "tool" and "name" not in message and name is not None:
            message = ChatMessage(**{**message, "name": name})
        if index >= len(history):
            named.append(message)
    return named


def written_out(message: ChatMessage) -> ChatMessage:
    """A message with its calls or a tool's result as text, for chat templates that have no form for them."""
    if message["role"] == "tool":
        name = message.get("name")
        head = f"Result of {name}:" if name else "Result:"
        return ChatMessage(role="user", content=f"{head}\n{message['content']}")
    if "tool_calls" in message:
        parts = [part for part in (message["content"], calls_as_json(message)) if part]
        return ChatMessage(role=message["role"], content="\n".join(parts))
    return message
