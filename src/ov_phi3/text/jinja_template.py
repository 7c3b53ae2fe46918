"""A model's own Jinja chat template: messages to segments, by the interpreter of openvino_genai."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ov_phi3.errors import TemplateError
from ov_phi3.system.jinja import render_jinja
from ov_phi3.text.jinja_marks import Marks
from ov_phi3.text.jinja_source import explicit_text, string_literals
from ov_phi3.text.messages import ChatMessage
from ov_phi3.text.segments import Segment, joined

__all__ = ["JinjaTemplate"]

# Probes: words of letters only, so that no template and no tokenizer sees anything in them.
_PROBE, _OTHER = "Xqovprobe", "Zkovother"
_NAME = re.compile(r"\w+")
_ROLE = re.compile(r"role['\"]?\s*\]?\s*(?:==|!=)\s*['\"]([a-z_]+)['\"]")


@dataclass(frozen=True)
class JinjaTemplate:
    """A Jinja chat template.

    Attributes:
        source: the template.
        bos: the tokenizer's BOS token, or "".
        eos: the tokenizer's EOS token, or "".
        names: names of the tokenizer's control tokens.
        interpret: renders a source with variables; raises TemplateError.
    """

    source: str
    bos: str = ""
    eos: str = ""
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)
    interpret: Callable[[str, Mapping[str, Any]], str] = field(default=render_jinja, repr=False)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that the template names."""
        return tuple(dict.fromkeys(_ROLE.findall(self.source)))

    def segments(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        """The segments of a whole prompt: those of the string that the template makes, control tokens apart.

        Raises:
            PromptError: a text holds a lone surrogate.
            TemplateError: the template or its interpreter refuses the messages, leaves one of them out, or has no place
                for the tools.
        """
        for role in dict.fromkeys(message["role"] for message in messages):
            if _leaves_out(self, role):
                raise TemplateError(_left_out(role))
        if any(message.get("tool_calls") for message in messages) and not _writes_calls(self, as_text=False):
            if not _writes_calls(self, as_text=True):
                raise TemplateError("a message has tool_calls, which the model's chat template has no form for.")
            messages = [_with_text_arguments(message) for message in messages]
        if tools and not self.takes_tools:
            raise TemplateError("tools were given, which the model's chat template has no place for.")
        return self._segments(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    @property
    def takes_tools(self) -> bool:
        """Whether the template writes the tools that `segments` gets."""
        return _takes_tools(self)

    @property
    def takes_system(self) -> bool:
        """Whether the template writes a system message."""
        return _takes_system(self)

    @property
    def problem(self) -> str | None:
        """Why the template cannot be used at all; None if it can."""
        return _problem(self)

    def continued(self, messages: Sequence[ChatMessage]) -> list[Segment]:
        """The segments of a prompt that ends with the text of the last message, an assistant's.

        Raises:
            TemplateError: as `segments`, or the template leaves the last message out.
        """
        probe = ChatMessage(role="assistant", content=_PROBE)
        parts = _cut(self.segments([*messages[:-1], probe], add_generation_prompt=False), _PROBE)
        if parts is None:
            raise TemplateError("the model's chat template does not write the last message, so it cannot be continued.")
        return [*parts[0], Segment(messages[-1]["content"], False)]

    def beginning(self, messages: Sequence[ChatMessage]) -> list[Segment]:
        """The segments with which every chat begins that begins with these messages.

        Raises:
            TemplateError: as `segments`, or the template writes the messages otherwise once others follow.
        """
        common = self._common(messages)
        user = ChatMessage(role="user", content=_PROBE)
        if not messages or messages[-1]["role"] == "user":
            return common
        if [*common, *self.following([user])] != joined(self.segments([*messages, user])):
            raise TemplateError(
                "the model's chat template does not write these messages in front of the next one. Give the prefix as "
                "Raw text or token ids."
            )
        return common

    def following(self, messages: Sequence[ChatMessage], *, continued: bool = False) -> list[Segment]:
        """The segments of messages that follow those of `beginning`, and a generation prompt.

        Args:
            messages: the messages, or none.
            continued: end with the text of the last message, as `continued` does.

        Raises:
            TemplateError: as `segments`.
        """
        chat = [ChatMessage(role="user", content=_PROBE), ChatMessage(role="assistant", content=_OTHER)]
        whole = [*chat, *messages]
        segments = joined(self.continued(whole) if continued else self.segments(whole))
        return segments[len(self._common(chat)) :]

    def _common(self, messages: Sequence[ChatMessage]) -> list[Segment]:
        """The segments that begin the chat whatever follows."""
        variants = []
        for role, text in (("user", _PROBE), ("user", _OTHER), ("assistant", _PROBE), ("assistant", _OTHER)):
            try:
                variants.append(joined(self.segments([*messages, ChatMessage(role=role, content=text)])))
            except TemplateError as exc:
                refused = exc
        if len(variants) < 2:
            raise refused
        columns = list(zip(*variants, strict=False))
        return [column[0] for column in columns[: next(n for n, c in enumerate(columns) if len(set(c)) > 1)]]

    def rest_behind(
        self,
        history: Sequence[ChatMessage],
        new: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment] | None:
        """The segments that follow the reply at the end of a conversation when new messages are added.

        Args:
            history: the conversation; the last message is the reply.
            new: the new messages.
            tools: as for `segments`.

        Returns:
            The segments from the end of the reply to the generation prompt; None if the template writes the
            conversation otherwise once it goes on, for instance without the reasoning of earlier replies.

        Raises:
            TemplateError: as `segments`.
        """
        answer = history[-1]
        before = joined(self.segments(history[:-1], tools=tools)) if len(history) > 1 else []
        probe = ChatMessage(role="assistant", content=_PROBE)
        parts = _cut(self.segments([*history[:-1], probe, *new], tools=tools), _PROBE)
        if parts is None or joined(parts[0]) != before:
            return None
        if not answer.get("tool_calls"):
            real = _text(self.segments([*history, *new], tools=tools))
            head, tail = _text(parts[0]), _text(parts[1])
            middle = real[len(head) : len(real) - len(tail)]
            if real != head + middle + tail or middle.strip() != answer["content"].strip():
                return None
        return parts[1]

    def _segments(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        source = _explicit(self.source)

        def render(change: Callable[[str], str]) -> str:
            variables = {
                "messages": [_changed_message(message, change) for message in messages],
                "tools": None if tools is None else _changed(list(tools), change),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": self.bos,
                "eos_token": self.eos,
            }
            return self.interpret(source, variables)

        texts = (text for message in messages for text in _texts(dict(message, role="")))
        given = [*texts, *_texts(list(tools or ()))]
        try:
            return Marks(self.names, _literals(self.source)).segments(render, given)
        except TemplateError as exc:
            raise TemplateError(f"the model's chat template cannot render these messages: {exc}") from exc


# -- what a template does, found by probes -------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _explicit(source: str) -> str:
    return explicit_text(source)


@lru_cache(maxsize=16)
def _literals(source: str) -> tuple[str, ...]:
    return tuple(text for text in dict.fromkeys(string_literals(source)) if len(text.strip()) > 1)


def _probed(template: JinjaTemplate, messages: list[ChatMessage], **how: Any) -> str | None:
    try:
        return _text(template._segments(messages, **how))
    except TemplateError:
        return None


@lru_cache(maxsize=64)
def _problem(template: JinjaTemplate) -> str | None:
    try:
        template._segments([ChatMessage(role="user", content=_PROBE)])
    except TemplateError as exc:
        return str(exc)
    return _left_out("user") if _leaves_out(template, "user") else None


@lru_cache(maxsize=64)
def _leaves_out(template: JinjaTemplate, role: str) -> bool:
    """Whether the template drops messages of a role without an error."""
    one, other = (_probed(template, _chat_with(role, text)) for text in (_PROBE, _OTHER))
    return one is not None and one == other


@lru_cache(maxsize=64)
def _takes_system(template: JinjaTemplate) -> bool:
    """Whether the template writes a system message; some refuse it."""
    text = _probed(template, _chat_with("system", _PROBE))
    return text is not None and _PROBE in text


def _chat_with(role: str, text: str) -> list[ChatMessage]:
    """A short chat with a message of this role."""
    user, probe = ChatMessage(role="user", content="x"), ChatMessage(role=role, content=text)
    if role != "tool":
        return {"system": [probe, user], "user": [probe]}.get(role, [user, probe, user])
    calls = [{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}]
    probe["tool_call_id"] = "call00001"
    return [user, ChatMessage(role="assistant", content="", tool_calls=calls), probe]


@lru_cache(maxsize=64)
def _writes_calls(template: JinjaTemplate, *, as_text: bool) -> bool:
    calls = [{"id": "call00001", "type": "function", "function": {"name": _PROBE, "arguments": {_OTHER: 1}}}]
    answer = ChatMessage(role="assistant", content="", tool_calls=calls)
    if as_text:
        answer = _with_text_arguments(answer)
    result = ChatMessage(role="tool", content="x", tool_call_id="call00001")
    text = _probed(template, [ChatMessage(role="user", content="x"), answer, result])
    if text is None:
        text = _probed(template, [ChatMessage(role="user", content="x"), answer], add_generation_prompt=False)
    return text is not None and _PROBE in text and (f'"{_OTHER}"' in text or (_OTHER in text and "'" not in text))


@lru_cache(maxsize=64)
def _takes_tools(template: JinjaTemplate) -> bool:
    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": _PROBE, "description": "x", "parameters": schema}}
    text = _probed(template, [ChatMessage(role="user", content="x")], tools=[tool])
    return text is not None and _PROBE in text


def _left_out(role: str) -> str:
    if role == "system":
        return (
            "the model's chat template has no system message: it drops it without an error. Put the text in front of "
            "the first user message."
        )
    return f"the model's chat template drops messages with the role {role!r} without an error."


# -- messages and segments -----------------------------------------------------------------------------------------


def _with_text_arguments(message: ChatMessage) -> ChatMessage:
    """The message with the arguments of its calls as JSON text, which some templates expect."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        if not isinstance(call["function"]["arguments"], str)
        else call
        for call in message["tool_calls"]
    ]
    return ChatMessage(**{**message, "tool_calls": calls})


def _changed_message(message: ChatMessage, change: Callable[[str], str]) -> dict[str, Any]:
    changed = _changed({key: value for key, value in message.items() if key != "role"}, change)
    return {"role": message["role"], **changed}


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        # Names are left as they are: the template looks for them.
        return {
            key if _NAME.fullmatch(str(key)) else change(str(key)): item
            if key == "type" and _NAME.fullmatch(str(item))
            else _changed(item, change)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_changed(item, change) for item in value]
    return value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _cut(segments: Sequence[Segment], probe: str) -> tuple[list[Segment], list[Segment]] | None:
    """The segments before and behind a probe that occurs once; None if it does not."""
    places = [index for index, (text, control) in enumerate(segments) if not control and probe in text]
    if len(places) != 1 or segments[places[0]].text.count(probe) != 1:
        return None
    before, _, behind = segments[places[0]].text.partition(probe)
    head = [*segments[: places[0]], Segment(before, False)]
    return [s for s in head if s.text], [s for s in (Segment(behind, False), *segments[places[0] + 1 :]) if s.text]
