"""Requests of OpenAI's API in our terms: prompts and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.names import OPENAI
from ov_phi3.many import row_seed

if TYPE_CHECKING:
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = ["ReplyRequest", "chat_request", "completion_request"]

# Parameters that say how OpenAI bills, caches or routes a request, not what the reply is.
_IGNORED = ("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls")
_NOT_SERVED = {
    "num_return_sequences": "it is called 'n' here",
    "num_beams": "beam search is not served",
    "logits_processors": "functions cannot be sent",
}
_OWN = frozenset(GenerationConfig.__dataclass_fields__) - set(OPENAI)
_MOST_REPLIES = 128  # OpenAI's limit of n
_MOST_LOGPROBS = 5  # OpenAI's limit of the completions' logprobs


@dataclass(frozen=True)
class ReplyRequest:
    """What a request asks for.

    Attributes:
        prompts: as `Pipeline.stream` takes them; one for chats.
        config: options of each reply, without the seed of each.
        n: replies to each prompt.
        stream: send the replies as they come.
        include_usage: end the stream with the usage.
        tools: options of a request with tools; empty without.
        continue_final_message: see `Pipeline.generate`.
        echo: put the prompt in front of the reply.
        session_id: the conversation to keep in the cache.
    """

    prompts: Sequence[Any]
    config: GenerationConfig
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    tools: Mapping[str, Any] | None = None
    continue_final_message: bool = False
    echo: bool = False
    session_id: str | None = None

    def config_of(self, index: int) -> GenerationConfig:
        """The options of the reply with this index: the seed as given for the first, made from it for the others."""
        seed = self.config.seed
        return self.config if seed is None or not index else self.config.replace(seed=row_seed(seed, index))

    @property
    def count(self) -> int:
        """Number of replies."""
        return self.n * len(self.prompts)


def chat_request(body: Mapping[str, Any]) -> ReplyRequest:
    """A request of /v1/chat/completions.

    Raises:
        ConfigError: a parameter is unknown, out of range, or not supported.
        TypeError: a value has a wrong type.
    """
    rest = dict(body)
    how = _common(rest)
    continues = bool(rest.pop("continue_final_message", False))
    tools = {name: rest.pop(name) for name in ("tools", "tool_choice") if rest.get(name) is not None}
    if not tools.get("tools"):
        if tools.get("tool_choice", "none") not in ("none", "auto"):
            raise ConfigError(f"tool_choice={tools['tool_choice']!r} needs tools.")
        tools = {}
    messages = rest.pop("messages", None)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConfigError("messages must be a list with at least one message.")
    return ReplyRequest([messages], _config(rest), tools=tools or None, continue_final_message=continues, **how)


def completion_request(body: Mapping[str, Any], tokenizer: Tokenizer) -> ReplyRequest:
    """A request of /v1/completions. A prompt is text without a chat template, or token ids.

    Raises:
        ConfigError: a parameter is unknown, out of range, or not supported.
        PromptError: a prompt cannot be encoded.
        TypeError: a value has a wrong type.
    """
    rest = dict(body)
    how = _common(rest)
    echo = bool(rest.pop("echo", None))
    prompt = rest.pop("prompt", None)
    logprobs = rest.pop("logprobs", None)
    if logprobs is not None:
        if isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= _MOST_LOGPROBS:
            raise ConfigError(f"logprobs={logprobs!r}; expected a number from 0 to {_MOST_LOGPROBS}.")
        rest |= {"logprobs": True, "top_logprobs": logprobs}
    if rest.pop("suffix", None):
        raise ConfigError("suffix is not supported here: the models complete a text at its end only.")
    best_of = rest.pop("best_of", None)
    if best_of not in (None, how["n"]):
        raise ConfigError(f"best_of={best_of!r} is not supported here; leave it out, or give n={how['n']} again.")
    many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = [tokenizer.encode(one) if isinstance(one, str) else one for one in (prompt if many else [prompt])]
    return ReplyRequest(prompts, _config(rest), echo=echo, **how)


def _common(rest: dict[str, Any]) -> dict[str, Any]:
    """Take what both kinds of request have, besides options of the reply."""
    for name in _IGNORED:
        rest.pop(name, None)
    n = rest.pop("n", None)
    n = 1 if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= _MOST_REPLIES:
        raise ConfigError(f"n={n!r}; expected a number from 1 to {_MOST_REPLIES}.")
    stream_options = rest.pop("stream_options", None) or {}
    if not isinstance(stream_options, Mapping):
        raise ConfigError(f"stream_options={stream_options!r}; expected an object such as {{'include_usage': true}}.")
    stream = bool(rest.pop("stream", None))
    if stream_options and not stream:
        raise ConfigError("stream_options needs stream=true.")
    include_usage = bool(stream_options.get("include_usage"))
    return {"n": n, "stream": stream, "include_usage": include_usage, "session_id": rest.pop("session_id", None)}


def _config(rest: dict[str, Any]) -> GenerationConfig:
    """The options: OpenAI's parameters, and those that only this library has, by their own names."""
    for name, reason in _NOT_SERVED.items():
        if rest.get(name) is not None:
            raise ConfigError(f"{name}={rest[name]!r} is not taken here: {reason}.")
    own = {name: rest.pop(name) for name in list(rest) if name in _OWN}
    bias = rest.get("logit_bias")
    if isinstance(bias, Mapping):
        rest["logit_bias"] = {_token(key): value for key, value in bias.items()} or None
    config = GenerationConfig.from_openai(rest)
    return config.replace(**{name: value for name, value in own.items() if value is not None}) if own else config


def _token(key: object) -> int:
    try:
        return int(str(key))
    except ValueError:
        raise ConfigError(f"logit_bias has the key {key!r}; expected token ids.") from None
