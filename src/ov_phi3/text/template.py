"""Phi-3 chat templates: messages to control tokens and text.

A chat template turns messages into *segments*: each is a control token (`<|user|>`) or text. The tokenizer encodes the
two kinds differently, so user text never becomes a control token. All segments joined are the string that the model's
own `chat_template` (Jinja) gives.

The templates are those of the published models' `tokenizer_config.json`: Phi-3-mini-4k-instruct of April 2024 and its
later revision (which added the system message), Phi-3.5-mini-instruct, Phi-4-mini-instruct and Phi-4.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ov_phi3.errors import TemplateError, did_you_mean
from ov_phi3.model.info import ModelInfo
from ov_phi3.text.jinja_template import JinjaTemplate
from ov_phi3.text.messages import ChatMessage, Message, check_final, normalize
from ov_phi3.text.segments import Raw, Segment
from ov_phi3.text.tool_calls import CALL_END, CALL_START
from ov_phi3.text.tools import calls_as_json, name_results, written_out

__all__ = ["ChatTemplate", "Raw", "Segment"]

_PUBLISHED = {
    "dcaee66df77bfbb7": "phi3",
    "268b6082ceb7176d": "phi3_april_2024",
    "605841622bcb6572": "phi3_april_2024",
    "78d976a442bcde2f": "phi35",
    "febf589225c9728a": "phi4_mini",
    "fe4120415a3858b8": "phi4",
}
"""Named constructors by the first digits of the SHA-256 of the Jinja templates that Microsoft published."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a model family.

    Use `for_model(directory)`, which takes the model's own template, whatever it is, or a named constructor (`phi3()`,
    `phi3_april_2024()`, `phi35()`, `phi4_mini()`, `phi4()`).

    Attributes:
        name: the constructor's name.
        header: text before a message; `{role}` is replaced. Names between `<|` and `|>` are control tokens.
        end: text after a message.
        roles: accepted roles.
        bos: control token at the start of the prompt, or "".
        eos: control token at the end of a transcript without a generation prompt, or "".
        open_after_user: the assistant's header follows each user message (April 2024), so `add_generation_prompt`
            changes nothing.
        skip_empty_system: omit a system message without content (Phi-3.5).
        tools: the system message may have the key "tools" (Phi-4-mini).
        jinja: the model's own template, which then does everything; None for a named constructor.
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
    jinja: JinjaTemplate | None = None
    _split_texts: dict[str, tuple[Segment, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- the templates -----------------------------------------------------------------------------------------------

    @classmethod
    def phi3(cls) -> ChatTemplate:
        """Phi-3-mini and Phi-3-medium as revised in mid-2024, with a system message."""
        return cls("phi3")

    @classmethod
    def phi3_april_2024(cls, *, bos: str = "<s>") -> ChatTemplate:
        """Phi-3-mini as first published, without a system message; Phi-3-medium is the same with `bos=""`."""
        return cls("phi3_april_2024", roles=("user", "assistant"), bos=bos, eos="", open_after_user=True)

    @classmethod
    def phi35(cls) -> ChatTemplate:
        """Phi-3.5-mini: as `phi3`, but an empty system message is omitted."""
        return cls("phi35", skip_empty_system=True)

    @classmethod
    def phi4_mini(cls) -> ChatTemplate:
        """Phi-4-mini: no newlines, and tools inside the system message."""
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
        """The model's own chat template; `phi3()` if the model has none.

        Raises:
            ModelError: the directory is not a usable model.
        """
        return cls.for_info(ModelInfo.from_dir(model_dir))

    @classmethod
    def for_info(cls, info: ModelInfo) -> ChatTemplate:
        """As `for_model`, for a directory that is read already."""
        names = [token.content for token in info.added_tokens]
        return cls.from_jinja(info.chat_template, eos=info.eos_token, bos=info.bos_token, names=names)

    @classmethod
    def from_jinja(
        cls, source: str | None, *, eos: str | None = None, bos: str | None = None, names: Sequence[str] = ()
    ) -> ChatTemplate:
        """A Jinja chat template. One that Microsoft published for a Phi model gives its named constructor.

        Any other is rendered by the interpreter that openvino_genai has, with the rules that transformers sets.

        Args:
            source: the Jinja template. None or "" gives `phi3()`.
            eos: the tokenizer's EOS token, if it has one.
            bos: the tokenizer's BOS token, if it has one.
            names: names of the tokenizer's control tokens. `Tokenizer` adds those of its graph.
        """
        if not source:
            return cls.phi3()
        name = _PUBLISHED.get(hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:16])
        if name is None:
            jinja = JinjaTemplate(source, bos or "", eos or "", tuple(names))
            return cls("model's own", roles=jinja.roles, bos="", eos="", jinja=jinja)
        template: ChatTemplate = getattr(cls, name)()
        if template.bos:
            template = replace(template, bos=(bos or "<s>") if "bos_token" in source else "")
        return replace(template, eos=eos or template.eos if "eos_token" in source else "")

    def with_names(self, names: Sequence[str]) -> ChatTemplate:
        """The same template, for a tokenizer with these control tokens."""
        if self.jinja is None or set(names) <= set(self.jinja.names):
            return self
        return replace(self, jinja=replace(self.jinja, names=tuple(dict.fromkeys((*self.jinja.names, *names)))))

    @property
    def problem(self) -> str | None:
        """Why no messages can be rendered, as a sentence; None if they can."""
        return None if self.jinja is None else self.jinja.problem

    @property
    def takes_tools(self) -> bool:
        """Whether `segments` takes `tools`."""
        return self.tools or (self.jinja is not None and self.jinja.takes_tools)

    @property
    def takes_system(self) -> bool:
        """Whether there is a form for a system message."""
        return "system" in self.roles if self.jinja is None else self.jinja.takes_system

    # -- rendering ---------------------------------------------------------------------------------------------------

    def segments(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        """The segments of a whole prompt.

        Args:
            messages: the chat.
            add_generation_prompt: end with the assistant's header; otherwise with `eos`.
            continue_final_message: end with the text of the last message, an assistant's, which the reply continues.
            tools: definitions of tools as OpenAI's API has them. The model's own template gets them as its variable
                `tools`; Phi-4-mini's writes them into the system message. Ask `takes_tools` first.

        Raises:
            TemplateError: no message, an unknown role, content that is not text, `continue_final_message` with
                messages that do not end with the assistant's, or `tools` that the template has no place for.
            TypeError: `messages` is not a sequence of mappings.
        """
        normal = self._normalized(messages)
        if not normal:
            raise TemplateError("messages is empty; a prompt needs at least one message with role 'user'.")
        if continue_final_message:
            check_final(normal, continue_final_message=True)
            return self.jinja.continued(normal) if self.jinja else self._without_end(self._beginning(normal))
        if self.jinja:
            return self.jinja.segments(normal, add_generation_prompt=add_generation_prompt, tools=tools)
        if tools:
            normal = self._with_tools(normal, tools)
        segments = self._beginning(normal)
        if add_generation_prompt:
            segments += self._generation_prompt()
        elif self.eos:
            segments.append(Segment(self.eos, True))
        return segments

    def beginning(self, messages: Sequence[Message]) -> list[Segment]:
        """The segments of the first messages of a chat, without a generation prompt and without `eos`.

        Every chat that begins with these messages begins with these segments.

        Raises:
            TemplateError: as `segments`.
        """
        normal = self._normalized(messages)
        return self.jinja.beginning(normal) if self.jinja else self._beginning(normal)

    def following(self, messages: Sequence[Message], *, continue_final_message: bool = False) -> list[Segment]:
        """The segments of messages that follow those of `beginning`, and a generation prompt.

        Args:
            messages: the messages, or none.
            continue_final_message: end with the text of the last message, as in `segments`.

        Raises:
            TemplateError: as `segments`.
        """
        normal = self._normalized(messages)
        if continue_final_message:
            check_final(normal, continue_final_message=True)
        if self.jinja:
            return self.jinja.following(normal, continued=continue_final_message)
        if continue_final_message:
            return self._without_end(self._all_messages(normal))
        return self._all_messages(normal) + self._generation_prompt()

    def continuation(
        self, messages: Sequence[Message], history: Sequence[Message] | None = None
    ) -> list[Segment] | None:
        """The segments behind a reply: the end of the reply's message, the next messages, a generation prompt.

        Args:
            messages: the next messages.
            history: the conversation up to the reply, its last message. A named constructor does not need it.

        Returns:
            The segments; None if the model's own template writes the conversation otherwise once it goes on, so that
            all of it must be rendered again.

        Raises:
            TemplateError: as `segments`.
        """
        if not self.jinja:
            return self._split(self.end) + self.following(messages)
        chat = history or [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        return self.jinja.rest_behind(self._normalized(chat), self._normalized(messages))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as one string, equal to the result of the model's own `chat_template`.

        Use it to read or to compare prompts. Encode messages with `Tokenizer.encode_messages`: in this string, user
        text that looks like a control token cannot be distinguished from a control token.

        Raises:
            TemplateError: as `segments`.
        """
        return "".join(s.text for s in self.segments(messages, add_generation_prompt=add_generation_prompt))

    def _with_tools(self, messages: list[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
        """The messages with tools in the system message, in front of the others if there is none."""
        if not self.tools:
            raise TemplateError(f"tools were given, which the {self.name} chat template has no place for.")
        if messages[0]["role"] != "system":
            messages = [ChatMessage(role="system", content=""), *messages]
        return [ChatMessage(**{"tools": list(tools), **messages[0]}), *messages[1:]]

    def _generation_prompt(self) -> list[Segment]:
        return [] if self.open_after_user else self._split(self.header.format(role="assistant"))

    def _without_end(self, segments: list[Segment]) -> list[Segment]:
        """Without the end of the last message."""
        return segments[: len(segments) - len(self._split(self.end))]

    def _beginning(self, normal: Sequence[ChatMessage]) -> list[Segment]:
        return ([Segment(self.bos, True)] if self.bos else []) + self._all_messages(normal)

    def _all_messages(self, normal: Sequence[ChatMessage]) -> list[Segment]:
        return [segment for index, message in enumerate(normal) for segment in self._one_message(index, message)]

    def _normalized(self, messages: Sequence[Message]) -> list[ChatMessage]:
        """The messages in one form, with calls and results of tools as text if the template has no form for them."""
        normal = name_results(normalize(messages, self.roles))
        return [message if self._has_form(message) else written_out(message) for message in normal]

    def _has_form(self, message: ChatMessage) -> bool:
        """Whether the template has a form for calls and results of tools, if the message has any."""
        if self.jinja is not None:
            return self.jinja.takes_tools
        return self.tools if "tool_calls" in message else message["role"] in self.roles

    def _one_message(self, index: int, message: ChatMessage) -> list[Segment]:
        self._check_message(f"messages[{index}]", message)
        role, content, tools = message["role"], message["content"], message.get("tools")
        if role == "system" and self.skip_empty_system and not content:
            return []
        has_header = self.open_after_user and role == "assistant"
        segments = [] if has_header else self._split(self.header.format(role=role))
        segments.append(Segment(content, False))
        if "tool_calls" in message:
            segments += [Segment(CALL_START, True), Segment(calls_as_json(message), False), Segment(CALL_END, True)]
        if tools is not None:
            text = tools if isinstance(tools, str) else json.dumps(tools)
            segments += [Segment("<|tool|>", True), Segment(text, False), Segment("<|/tool|>", True)]
        segments += self._split(self.end)
        if self.open_after_user and role == "user":
            segments += self._split(self.header.format(role="assistant"))
        return segments

    def _split(self, text: str) -> list[Segment]:
        """Split a header or an end into its control tokens and the text between them."""
        if text not in self._split_texts:
            parts = re.split(r"(<\|[a-z_/]+\|>)", text)
            self._split_texts[text] = tuple(Segment(part, bool(i % 2)) for i, part in enumerate(parts) if part)
        return list(self._split_texts[text])

    def _check_message(self, label: str, message: ChatMessage) -> None:
        """Refuse a message that the template has no form for."""
        role = message["role"]
        if role not in self.roles:
            raise TemplateError(f"{label} has the role {role!r}; {self._roles_help(role)}")
        if "tools" in message and not self.tools:
            raise TemplateError(f"{label} has 'tools', which the {self.name} chat template has no place for.")

    def _roles_help(self, role: str) -> str:
        if role == "system":
            return (
                f"the {self.name} chat template has no system message, and the model's own template drops it without "
                "an error. Put the text in front of the first user message."
            )
        return f"the {self.name} chat template takes {list(self.roles)}.{did_you_mean(role, self.roles)}"
