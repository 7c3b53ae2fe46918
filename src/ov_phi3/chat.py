"""A conversation that keeps the exact token ids of every turn.

A reply's ids are kept as they were generated and never made from text again: text decoded and encoded again can give
other ids, and then the engine's prefix cache no longer matches.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import ConfigError, StreamError, did_you_mean
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.results import GenerationResult
from ov_phi3.kv.cache import KVUsage
from ov_phi3.prefix import written

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.engine.stream import Channel, TokenStream
    from ov_phi3.engine.worker import OnPrefill
    from ov_phi3.kv.cache import KVValue
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = ["Chat", "Exchange"]

_OVERFLOW = ("error", "drop_oldest")
_ON_CANCEL = ("keep", "drop")
# Room that a reply without max_new_tokens is given before "drop_oldest" drops anything: at most so many tokens, and at
# most this part of the window.
_REPLY_TOKENS = 1024
_REPLY_SHARE = 4
_log = logging.getLogger("ov_phi3")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn that has ended: what was said, and the reply's ids as they were generated."""

    user: dict[str, str]
    assistant: dict[str, str]
    reply: tuple[int, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The two messages, as copies."""
        return [dict(self.user), dict(self.assistant)]


@dataclass(frozen=True, slots=True)
class _State:
    """A conversation between two turns. Never changed, so that a fork shares it and a failed turn leaves it."""

    system: dict[str, str] | None
    turns: tuple[Exchange, ...] = ()
    ids: tuple[int, ...] = ()
    reused: int = 0
    dropped: int = 0

    @property
    def head(self) -> list[dict[str, str]]:
        return [] if self.system is None else [self.system]


class Chat:
    """One conversation on a pipeline. Made by `Pipeline.chat`. Several can take turns on one pipeline, and each finds
    its own prefix in the cache as long as there is room for all of them.

    A turn that fails leaves the conversation as it was.

    Attributes:
        overflow: "error" or "drop_oldest", see `Pipeline.chat`.
        on_cancel: "keep" or "drop", for turns that do not say.
    """

    def __init__(
        self, pipeline: Pipeline, *, system: str | None = None, overflow: str = "error", on_cancel: str = "keep"
    ) -> None:
        self.overflow = _one_of("overflow", overflow, _OVERFLOW)
        self.on_cancel = _one_of("on_cancel", on_cancel, _ON_CANCEL)
        self._pipeline = pipeline
        self._lock = threading.Lock()  # of the state, for one moment
        self._turn = threading.Lock()  # of starting a turn
        self._running: Channel | None = None
        self._kv: KVValue | None = None  # of a chat that was loaded, until its first turn has used it
        self._state = _State(None if system is None else {"role": "system", "content": system})
        if system is not None:
            pipeline.tokenizer.template.segments(self._state.head)  # a layout without a system turn says so now
            self._check_alone({"role": "user", "content": ""}, 1, "the system message")

    def __repr__(self) -> str:
        state = self._now()
        return f"<Chat of {len(state.turns)} turns, {len(state.ids)} tokens>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as a copy."""
        state = self._now()
        return [dict(m) for m in state.head] + [m for turn in state.turns for m in turn.messages]

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Every id of the conversation so far, generated ones as they were generated; shape [tokens]."""
        return np.array(self._now().ids, dtype=np.int64)

    @property
    def dropped_turns(self) -> int:
        """How many turns "drop_oldest" has dropped so far; each result names those that it cost."""
        return self._now().dropped

    @property
    def kv(self) -> KVUsage:
        """What this conversation has in the KV cache now, and what is left of its context window."""
        state, pipeline = self._now(), self._pipeline
        cached = pipeline._generator.cached_tokens(np.array(state.ids, dtype=np.int64))
        window = pipeline.context_length
        return KVUsage(
            cached_tokens=cached,
            reused_tokens=state.reused,
            free_tokens=window - len(state.ids),
            context_length=window,
            bytes=round(cached * pipeline._pool.layout.bytes_per_token(pipeline.info)),
        )

    # -- turns -------------------------------------------------------------------------------------------------------

    def send(
        self,
        text: str,
        config: GenerationConfig | None = None,
        *,
        on_cancel: str | None = None,
        on_prefill: OnPrefill | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> GenerationResult:
        """One turn; returns the whole reply. Arguments and errors are those of `stream`."""
        return self.stream(text, config, on_cancel=on_cancel, on_prefill=on_prefill, timeout=timeout, **options).result

    def stream(
        self,
        text: str,
        config: GenerationConfig | None = None,
        *,
        on_cancel: str | None = None,
        on_prefill: OnPrefill | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> TokenStream:
        """One turn, as it comes. The turn is part of the conversation once the stream has ended.

        Args:
            text: the user's message.
            config: how to generate; `options` are laid over it.
            on_cancel: "keep" or "drop", for this turn; default: the chat's.
            on_prefill: told the progress of the prefill, see `Pipeline.generate`.
            timeout: seconds for the whole turn, see `Pipeline.generate`; a turn that ran out of time is kept or dropped
                as a cancelled one is.
            **options: fields of `GenerationConfig`.

        Raises:
            StreamError: the stream of the turn before is still running.
            ContextOverflowError: the turn does not fit the context window; with `overflow="drop_oldest"` only when it
                does not even fit alone, with the system message.
            Error: what `Pipeline.generate` raises.
        """
        if not isinstance(text, str):
            raise TypeError(f"a turn is a string, not {type(text).__name__}")
        keep = _one_of("on_cancel", self.on_cancel if on_cancel is None else on_cancel, _ON_CANCEL) == "keep"
        message = {"role": "user", "content": text}
        with self._turn:
            self._await_turn_before()
            wanted = self._pipeline._config(config, options)
            state, prompt, gone = self._fitting(message, wanted)
            stream = self._pipeline._start(
                prompt,
                wanted,
                {},
                streams=True,
                on_end=lambda result: self._end(state, gone, message, result, keep=keep),
                on_prefill=on_prefill,
                timeout=timeout,
                turns_before=len(state.turns),
            )
            # The channel and not the stream: a stream that its reader drops must still cancel itself.
            self._running = stream._channel
            return stream

    # -- other ways on -----------------------------------------------------------------------------------------------

    def rewind(self, turns: int = 1) -> None:
        """Take back the last turns, the user's messages and their replies. What stays is still in the cache.

        Args:
            turns: how many; 0 takes back nothing.

        Raises:
            ConfigError: there are not that many.
            StreamError: a reply is still coming.
        """
        if isinstance(turns, bool) or not isinstance(turns, int):
            raise TypeError(f"turns must be a whole number, not {turns!r}")
        with self._turn:
            self._await_turn_before()
            state = self._now()
            if not 0 <= turns <= len(state.turns):
                raise ConfigError(f"rewind(turns={turns}); expected 0 to {len(state.turns)}, the turns of this chat.")
            kept = state.turns[: len(state.turns) - turns]
            ids = self._laid_out(state.head, kept) if turns else state.ids
            self._set(replace(state, turns=kept, ids=ids))

    def fork(self) -> Chat:
        """A second conversation that goes on from here. Both find the common part in the cache.

        Raises:
            StreamError: a reply is still coming.
        """
        with self._turn:
            self._await_turn_before()
            branch = Chat(self._pipeline, overflow=self.overflow, on_cancel=self.on_cancel)
            branch._set(self._now())
            branch._kv = self._kv
            return branch

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the conversation to a file, whole or not at all; returns its size in bytes.

        With `backend="infer_request"` its keys and values are written too, so that the next turn need not compute them,
        in this process or another. `Pipeline.load_chat` reads it.

        Raises:
            StreamError: a reply is still coming.
            SnapshotError: it cannot be written.
            TypeError: `path` is not a path.
        """
        os.fspath(path)
        with self._turn:
            self._await_turn_before()
            return written(path, self)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _now(self) -> _State:
        with self._lock:
            return self._state

    def _set(self, state: _State) -> None:
        with self._lock:
            self._state = state

    def _await_turn_before(self) -> None:
        """A reply that was cancelled ends within one token and is waited for; one that still comes is in the way."""
        before = self._running
        if before is None or before.ended:
            return
        if not before.cancelled:
            raise StreamError("the reply to the turn before is still coming; read it to its end or cancel it first.")
        before.wait_ended()

    def _end(
        self,
        state: _State,
        gone: Sequence[Exchange],
        message: dict[str, str],
        result: GenerationResult | None,
        *,
        keep: bool,
    ) -> GenerationResult | None:
        """Take in a turn that ended with a result; one that failed, or was cancelled before its first token, never
        was.
        """
        if result is None or not result.token_ids or (result.finish_reason in ("cancelled", "timeout") and not keep):
            return result
        turn = Exchange(message, {"role": "assistant", "content": result.text}, tuple(result.token_ids))
        ids = (*result.prompt_token_ids, *result.token_ids)
        reused = result.metrics.reused_tokens or 0
        dropped = state.dropped + len(gone)
        self._set(replace(state, turns=(*state.turns, turn), ids=ids, reused=reused, dropped=dropped))
        self._kv = None
        return replace(result, dropped_messages=[m for turn in gone for m in turn.messages]) if gone else result

    # -- layout ------------------------------------------------------------------------------------------------------

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._pipeline.tokenizer

    def _laid_out(self, head: Sequence[dict[str, str]], turns: Sequence[Exchange]) -> tuple[int, ...]:
        """The ids of a conversation that ends with a reply; () for one that has not begun."""
        ids: list[int] = []
        for turn in turns:
            ids = [*self._with_message(head, ids, turn.user), *turn.reply]
        return tuple(ids)

    def _with_message(self, head: Sequence[dict[str, str]], ids: Sequence[int], message: dict[str, str]) -> list[int]:
        """The ids of a conversation with a new message: what was generated stays, only the new text is encoded."""
        tokenizer = self._tokenizer
        if not ids:
            first: list[int] = tokenizer.encode_messages([*head, message]).tolist()
            return first
        new = tokenizer.encode_segments(tokenizer.template.continuation(message)).tolist()
        # The reply's own end token goes, which need not be the one that the layout writes after a reply.
        return [*(ids[:-1] if ids[-1] in self._pipeline.info.eos_token_ids else ids), *new]

    # -- what fits ---------------------------------------------------------------------------------------------------

    def _fitting(
        self, message: dict[str, str], wanted: GenerationConfig
    ) -> tuple[_State, NDArray[np.int64], tuple[Exchange, ...]]:
        """The conversation that a new message goes on from, the prompt, and the turns that go."""
        state = self._now()
        prompt = self._with_message(state.head, state.ids, message)
        gone = 0
        if self.overflow == "drop_oldest" and state.turns:
            window = self._pipeline.context_length
            least = wanted.max_new_tokens or wanted.min_new_tokens or 1
            room = wanted.max_new_tokens or max(least, min(_REPLY_TOKENS, window // _REPLY_SHARE))
            if len(prompt) + room > window:
                self._check_alone(message, least, "the new message")
                gone, prompt = self._without_oldest(state, message, room, window)
        kept = replace(state, turns=state.turns[gone:])
        return kept, np.array(prompt, dtype=np.int64), state.turns[:gone]

    def _without_oldest(self, state: _State, message: dict[str, str], room: int, window: int) -> tuple[int, list[int]]:
        """How many of the oldest turns go until half of the window is free, or all are gone; and the prompt then.

        Each drop changes the ids right behind the system message, so that all that stays is prefilled again. Dropping
        down to a half means that this is paid once in many turns.
        """
        for gone in range(1, len(state.turns) + 1):
            prompt = self._with_message(state.head, self._laid_out(state.head, state.turns[gone:]), message)
            if len(prompt) + room <= window and len(prompt) <= window // 2:
                break
        _log.info("dropped the %d oldest turns of a chat; %d stay", gone, len(state.turns) - gone)
        return gone, prompt

    def _check_alone(self, message: dict[str, str], reply: int, what: str) -> None:
        """Refuse what cannot fit, whatever is dropped."""
        pipeline = self._pipeline
        tokens = len(self._with_message(self._now().head, (), message))
        if tokens + reply > pipeline.context_length:
            raise pipeline._limits.overflow(
                f"{what} takes {tokens} tokens with the layout around it, and the reply may take {reply}",
                tokens,
                reply,
                "Nothing that could be dropped would make room: shorten it, or ask for a shorter reply.",
            )


def _one_of(name: str, value: str, valid: Sequence[str]) -> str:
    if value not in valid:
        raise ConfigError(f"{name}={value!r}; expected one of {list(valid)}.{did_you_mean(str(value), valid)}")
    return value
