"""The kinds of prompt that the library takes, and their way to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ov_phi3.errors import ConfigError, PromptError
from ov_phi3.text.messages import Message, check_final, normalize
from ov_phi3.text.template import Raw
from ov_phi3.text.tokenizer import Ids, Tokenizer, as_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.text.tools import Tools

__all__ = ["Prompt", "as_messages", "check_continues", "describe_tools", "encode_prompt"]

Prompt: TypeAlias = str | Raw | Sequence[Message] | Ids
"""One user message, `Raw` text, the messages of a chat, or token ids of shape [tokens]."""


def as_messages(prompt: Prompt) -> Sequence[Message] | None:
    """Return the messages of a prompt; None if the prompt is `Raw` text or token ids."""
    if isinstance(prompt, str):
        return None if isinstance(prompt, Raw) else [{"role": "user", "content": prompt}]
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
        return prompt  # type: ignore[return-value]
    return None


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    continue_final_message: bool = False,
    tools: Tools | None = None,
) -> NDArray[np.int64]:
    """Encode a prompt for the engine: token ids, int64, shape [tokens].

    Messages go through the chat template, exactly once; `Raw` text and token ids do not.

    Args:
        prompt: any kind of prompt.
        tokenizer: encodes messages and text.
        vocab_size: a prompt of token ids may hold the ids from 0 to below this.
        continue_final_message: end with the text of the assistant's last message, which the reply continues.
        tools: tools that the prompt describes.

    Raises:
        ConfigError: `continue_final_message` or `tools` with a prompt that is not messages.
        PromptError, TemplateError: the prompt cannot become token ids, or it is empty.
        TypeError: `prompt` is none of the kinds above.
    """
    if tools is not None:
        prompt = describe_tools(prompt, tokenizer, tools)
    messages = as_messages(prompt)
    check_continues(messages, continue_final_message=continue_final_message)
    if messages is not None:
        check_final(normalize(messages, tokenizer.template.roles), continue_final_message=continue_final_message)
        ids = tokenizer.encode_messages(messages, continue_final_message=continue_final_message)
    elif isinstance(prompt, Raw):
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, Mapping):
        raise TypeError("prompt is a dict; a conversation is a list of {'role', 'content'} dicts")
    elif isinstance(prompt, Sequence) and any(isinstance(item, str) for item in prompt):
        raise TypeError(
            "prompt is a list of strings; one call answers one prompt. For a reply to each of them use "
            "generate_many(prompts); one conversation is a list of {'role', 'content'} dicts."
        )
    elif isinstance(prompt, Sequence) or hasattr(prompt, "__array__"):
        ids = as_ids(prompt, vocab_size)
    else:
        raise TypeError(
            "a prompt is a string, a list of {'role', 'content'} dicts, Raw text, or token ids, "
            f"not {type(prompt).__name__}"
        )
    if not ids.size:
        raise PromptError("the prompt is empty; give a text, messages or token ids.")
    return ids


def describe_tools(prompt: Prompt, tokenizer: Tokenizer, tools: Tools) -> Sequence[Message]:
    """The messages of a prompt, with a description of tools in the form of the model's chat template.

    Raises:
        ConfigError: the prompt is `Raw` text or token ids.
        TemplateError: as `normalize`.
    """
    messages, template = as_messages(prompt), tokenizer.template
    if messages is None:
        raise ConfigError(
            "tools needs a prompt that is a string or a list of messages: Raw text and token ids get no description of "
            "the tools. Give messages."
        )
    normal = normalize(messages, template.roles)
    return tools.described(normal, native=template.tools, system=template.takes_system)


def check_continues(messages: Sequence[Message] | None, *, continue_final_message: bool) -> None:
    """Refuse `continue_final_message` for a prompt that is not a list of messages.

    Raises:
        ConfigError: there are no messages.
        TypeError: `continue_final_message` is not a bool.
    """
    if not isinstance(continue_final_message, bool):
        raise TypeError(f"continue_final_message must be True or False, not {continue_final_message!r}")
    if continue_final_message and messages is None:
        raise ConfigError(
            "continue_final_message=True needs a list of messages that ends with the assistant's. Raw text and token "
            "ids are continued as they are; a string is a user's message."
        )
