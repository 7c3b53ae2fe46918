"""Phi-3 chat layouts: messages in, control tokens and text out.

A layout turns messages into *segments*, each of them either a control token (`<|user|>`) or text. The tokenizer
encodes the two kinds differently, which is what keeps user text from ever becoming a control token; joined together
they are the string that the model's own `chat_template` gives.

The layouts are those of the published models' `tokenizer_config.json`: Phi-3-mini-4k-instruct of April 2024 and its
later revision (which added the system turn), Phi-3.5-mini-instruct, Phi-4-mini-instruct and Phi-4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ov_phi3.errors import TemplateError, did_you_mean

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo

__all__ = ["ChatTemplate", "Message", "Raw", "Segment"]

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; content is a string, or OpenAI's list of `{"type": "text", "text": ...}` parts."""


class Raw(str):
    """Text whose control tokens are meant: `Raw("<|user|>Hi<|end|><|assistant|>")` is parsed, never templated or
    escaped.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Raw({super().__repr__()})"


class Segment(NamedTuple):
    """A piece of a prompt: a control token's text, or text that is only text."""

    text: str
    control: bool


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How one model family lays out a chat.

    Use a named constructor (`phi3()`, `phi3_april_2024()`, `phi35()`, `phi4_mini()`, `phi4()`), or
    `for_model(directory)`, which picks the one that the directory's own `chat_template` describes.

    Attributes:
        name: the constructor's name.
        header: what opens a turn; `{role}` is filled in. Control tokens are what stands between `<|` and `|>`.
        end: what closes a turn.
        roles: the roles that the layout can hold.
        bos: a control token put first, or "".
        eos: the control token that ends a transcript without a generation prompt, or "".
        open_after_user: the assistant's header follows each user turn at once (April 2024), so that
            `add_generation_prompt` changes nothing.
        skip_empty_system: a system message without content is left out (Phi-3.5).
        tools: a system message may carry "tools" (Phi-4-mini).
    """

    name: str
    header: str = "<|{role}|>\n"
    end: str = "<|end|>\n"
    roles: tuple[str, ...] = ("system", "user", "assistant")
    bos: str = ""
    eos: str = "<|endoftext|>"
    open_after_user: bool = False
    skip_empty_system: bool = False
    tools: bool = False
    _parts: dict[str, tuple[Segment, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- the layouts -------------------------------------------------------------------------------------------------

    @classmethod
    def phi3(cls) -> ChatTemplate:
        """Phi-3-mini and Phi-3-medium as revised in mid-2024, with a system turn."""
        return cls("phi3")

    @classmethod
    def phi3_april_2024(cls, *, bos: str = "<s>") -> ChatTemplate:
        """Phi-3-mini as first published, without a system turn; Phi-3-medium is the same with `bos=""`."""
        return cls("phi3_april_2024", roles=("user", "assistant"), bos=bos, eos="", open_after_user=True)

    @classmethod
    def phi35(cls) -> ChatTemplate:
        """Phi-3.5-mini: Phi-3's layout, but an empty system message is left out."""
        return cls("phi35", skip_empty_system=True)

    @classmethod
    def phi4_mini(cls) -> ChatTemplate:
        """Phi-4-mini: no newlines, and tools inside the system turn."""
        return cls(
            "phi4_mini",
            header="<|{role}|>",
            end="<|end|>",
            roles=("system", "user", "assistant", "tool", "tool_response"),
            tools=True,
        )

    @classmethod
    def phi4(cls) -> ChatTemplate:
        """Phi-4: ChatML with a separator token."""
        return cls("phi4", header="<|im_start|>{role}<|im_sep|>", end="<|im_end|>", eos="")

    @classmethod
    def for_model(cls, model_dir: str | Path) -> ChatTemplate:
        """The layout of the model in `model_dir`, read off its own chat template; Phi-3's where it has none.

        Raises:
            ModelError: the directory is not a usable model.
        """
        from ov_phi3.model.info import ModelInfo

        return cls.for_info(ModelInfo.from_dir(model_dir))

    @classmethod
    def for_info(cls, info: ModelInfo) -> ChatTemplate:
        """The same for a directory that was read already."""
        return cls.from_jinja(info.chat_template, eos=info.eos_token, bos=info.bos_token)

    @classmethod
    def from_jinja(cls, source: str | None, *, eos: str | None = None, bos: str | None = None) -> ChatTemplate:
        """The layout that a Jinja chat template describes, told by the features in which the families differ.

        The template is read as text, never executed. `eos` and `bos` are the tokenizer's, where it has them.
        """
        if not source:
            return cls.phi3()
        if "<|im_sep|>" in source:
            return cls.phi4()
        if "<|/tool|>" in source:
            chosen = cls.phi4_mini()
        elif "'system'" not in source and '"system"' not in source and "message['role'] +" not in source:
            return cls.phi3_april_2024(bos=(bos or "<s>") if "bos_token" in source else "")
        elif re.search(r"'system'\s+and\s+message\[", source):
            chosen = cls.phi35()
        else:
            chosen = cls.phi3()
        if "bos_token" in source:
            chosen = replace(chosen, bos=bos or "<s>")
        return replace(chosen, eos=eos or chosen.eos if "eos_token" in source else "")

    # -- rendering ---------------------------------------------------------------------------------------------------

    def segments(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[Segment]:
        """The messages as control tokens and text, in order.

        Raises:
            TemplateError: no message, an unknown role or key, or content that is not text.
            TypeError: `messages` is not a sequence of mappings.
        """
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
            raise TypeError(f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}")
        if not messages:
            raise TemplateError("messages is empty; a prompt needs at least one message with role 'user'.")
        out = self.beginning(messages)
        if add_generation_prompt:
            out += self._opening()
        elif self.eos:
            out.append(Segment(self.eos, True))
        return out

    def beginning(self, messages: Sequence[Message]) -> list[Segment]:
        """The messages alone, with nothing behind them: what every conversation that begins with them begins with.

        Raises:
            TemplateError: as `segments`.
        """
        return ([Segment(self.bos, True)] if self.bos else []) + self._turns(messages)

    def following(self, messages: Sequence[Message]) -> list[Segment]:
        """Messages that follow on `beginning`, and a generation prompt.

        Raises:
            TemplateError: as `segments`.
        """
        return self._turns(messages) + self._opening()

    def continuation(self, message: Message) -> list[Segment]:
        """What follows a reply when the conversation goes on: the reply's end, a further message, a generation prompt.

        Raises:
            TemplateError: as `segments`.
        """
        return self._layout(self.end) + self.following([message])

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as one string, equal to what the model's own `chat_template` gives.

        For reading and for comparing. Encode messages with `Tokenizer.encode_messages`, not by encoding this string:
        here text that looks like a control token can no longer be told from one.

        Raises:
            TemplateError: as `segments`.
        """
        return "".join(s.text for s in self.segments(messages, add_generation_prompt=add_generation_prompt))

    def _opening(self) -> list[Segment]:
        """The generation prompt."""
        return [] if self.open_after_user else self._layout(self.header.format(role="assistant"))

    def _turns(self, messages: Sequence[Message]) -> list[Segment]:
        return [segment for index, message in enumerate(messages) for segment in self._turn(index, message)]

    def _turn(self, index: int, message: Message) -> list[Segment]:
        role, content, tools = self._checked(index, message)
        if role == "system" and self.skip_empty_system and not content:
            return []
        opened_already = self.open_after_user and role == "assistant"
        out = [] if opened_already else self._layout(self.header.format(role=role))
        out.append(Segment(content, False))
        if tools is not None:
            out += [Segment("<|tool|>", True), Segment(tools, False), Segment("<|/tool|>", True)]
        out += self._layout(self.end)
        if self.open_after_user and role == "user":
            out += self._layout(self.header.format(role="assistant"))
        return out

    def _layout(self, text: str) -> list[Segment]:
        """A piece of layout split into its control tokens and the text between them."""
        if text not in self._parts:
            pieces = re.split(r"(<\|[a-z_/]+\|>)", text)
            self._parts[text] = tuple(Segment(p, bool(i % 2)) for i, p in enumerate(pieces) if p)
        return list(self._parts[text])

    def _checked(self, index: int, message: Message) -> tuple[str, str, str | None]:
        """Role, content and tools of one message, or an error that says which message and what is wrong with it."""
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise TypeError(f"{where} must be a dict with 'role' and 'content', not {type(message).__name__}")
        accepted = {"role", "content", "tools"} if self.tools else {"role", "content"}
        for key in message:
            if key not in accepted:
                hint = did_you_mean(str(key), accepted)
                raise TemplateError(f"{where} has the key {key!r}; this layout takes {sorted(accepted)}.{hint}")
        for key in ("role", "content"):
            if key not in message:
                raise TemplateError(f"{where} has no {key!r}: {dict(message)!r}.")
        role = message["role"]
        if not isinstance(role, str) or role not in self.roles:
            raise TemplateError(f"{where} has the role {role!r}; {self._roles_help(role)}")
        content = _text_of(message["content"], where)
        tools = message.get("tools")
        if tools is not None:
            if role != "system":
                raise TemplateError(f"{where} has 'tools'; Phi-4-mini takes them on the system message only.")
            tools = tools if isinstance(tools, str) else json.dumps(tools)
        return role, content, tools

    def _roles_help(self, role: object) -> str:
        if isinstance(role, str) and role == "system":
            return (
                f"the {self.name} layout has no system turn, and the model's own template drops it without a word. "
                "Put the text in front of the first user message."
            )
        return f"the {self.name} layout takes {list(self.roles)}.{did_you_mean(str(role), self.roles)}"


def _text_of(content: object, where: str) -> str:
    """A message's content as one string."""
    if isinstance(content, str):
        return str(content)
    if isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        texts = []
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise TemplateError(f"{where}: a content part must be {{'type': 'text', 'text': str}}, not {part!r}.")
            texts.append(part["text"])
        return "".join(texts)
    raise TemplateError(f"{where}: content must be a string or a list of text parts, not {type(content).__name__}.")
