"""A chat: a conversation on a loaded model, one turn after another."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ov_phi3.checks import one_of, whole_number
from ov_phi3.conversation import Added, Conversation, Turn, TurnEncoder, check_turn, user_message
from ov_phi3.engine.engine import Submission
from ov_phi3.engine.limits import seconds
from ov_phi3.engine.worker import ReplyOptions, now
from ov_phi3.errors import ConfigError, StreamError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.options import GenerationOptions, OnCancel, Overflow
from ov_phi3.generation.results import GenerationResult
from ov_phi3.generation.tool_choice import constrained
from ov_phi3.kv import snapshot
from ov_phi3.kv.entry import KVEntry
from ov_phi3.kv.layout import KVUsage
from ov_phi3.signatures import naming_options
from ov_phi3.text.messages import ChatMessage
from ov_phi3.text.tools import Tools, calls_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ov_phi3.engine.channel import Channel
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.engine.worker import OnPrefill
    from ov_phi3.loaded_model import LoadedModel
    from ov_phi3.text.messages import Message
    from ov_phi3.text.tools import ToolChoice

__all__ = ["Chat"]

# Room for a reply without max_new_tokens before "drop_oldest" drops anything: at most these tokens, and this part of
# the window.
_REPLY_TOKENS = 1024
_REPLY_SHARE = 4
_log = logging.getLogger("ov_phi3")


class Chat:
    """One conversation on a pipeline. Made by `Pipeline.chat`.

    Several chats can take turns on one pipeline; each finds its own prefix in the cache as long as there is room for
    all of them. A turn that fails leaves the conversation as it was.

    Attributes:
        overflow: "error" or "drop_oldest", see `Pipeline.chat`.
        on_cancel: "keep" or "drop", for turns without their own choice.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        tools: Tools | None = None,
        overflow: Overflow = "error",
        on_cancel: OnCancel = "keep",
    ) -> None:
        self.overflow = one_of("overflow", overflow, get_args(Overflow))
        self.on_cancel = one_of("on_cancel", on_cancel, get_args(OnCancel))
        self._model = model
        self._tools = tools
        self._encoder = TurnEncoder(model.tokenizer, tools)
        self._lock = threading.Lock()  # held while the conversation is read or replaced
        self._turn = threading.Lock()  # held while a turn is started
        self._running: Channel | None = None
        self._held_kv: KVEntry | None = None  # read from a file, or written to one by an unload; until a turn used it
        self._conversation = self._begin(system, messages)
        if self._conversation.system:
            # Also refuses a template without a system turn.
            self._check_fits_alone(user_message(""), 1, "the system message")
        model.engine.parking.add(self)

    def __repr__(self) -> str:
        conversation = self._now()
        return f"<Chat of {len(conversation.turns)} turns, {len(conversation.ids)} tokens>"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, as a copy."""
        return self._now().messages

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """All ids of the conversation so far, replies as they were generated; int64, shape [tokens]."""
        return np.array(self._now().ids)

    @property
    def dropped_turns(self) -> int:
        """Turns that "drop_oldest" has dropped so far; each result lists the messages that it dropped."""
        return self._now().dropped_turns

    @property
    def kv(self) -> KVUsage:
        """What this conversation has in the KV cache now, and what is left of its context window."""
        conversation, engine = self._now(), self._model.engine
        cached = engine.cached_tokens(conversation.ids)
        return KVUsage(
            cached_tokens=cached,
            reused_tokens=conversation.reused_tokens,
            free_tokens=engine.context_length - len(conversation.ids),
            context_length=engine.context_length,
            bytes=engine.kv_bytes(cached),
        )

    # -- turns -------------------------------------------------------------------------------------------------------

    @naming_options(GenerationOptions)
    def send(
        self,
        message: str | Message | Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        on_cancel: OnCancel | None = None,
        on_prefill: OnPrefill | None = None,
        timeout: float | None = None,
        tool_choice: ToolChoice | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """One turn; returns the whole reply. Arguments and errors are those of `stream`."""
        how: dict[str, Any] = {"on_cancel": on_cancel, "on_prefill": on_prefill, "timeout": timeout}
        return self.stream(message, config, tool_choice=tool_choice, **how, **options).result

    @naming_options(GenerationOptions)
    def stream(
        self,
        message: str | Message | Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        on_cancel: OnCancel | None = None,
        on_prefill: OnPrefill | None = None,
        timeout: float | None = None,
        tool_choice: ToolChoice | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TokenStream:
        """One turn, streamed. The turn becomes part of the conversation when the stream has ended.

        Args:
            message: a text of the user's, a message, or a list of messages, in which an assistant's ends a turn of its
                own. Messages that `Pipeline.chat(messages=...)` left without a reply come before it; `[]` answers these
                alone.
            config: how to generate; `options` override it.
            on_cancel: "keep" or "drop", for this turn; default: the chat's.
            on_prefill: receives the progress of the prefill, see `Pipeline.generate`.
            timeout: seconds for the whole turn, see `Pipeline.generate`; a turn that timed out is kept or dropped as a
                cancelled turn is.
            tool_choice: whether this turn calls the chat's tools, see `Pipeline.generate`.
            **options: fields of `GenerationConfig`.

        Raises:
            StreamError: the stream of the previous turn is still running.
            TemplateError: messages that the chat template has no form for, or nothing to answer.
            ContextOverflowError: the turn does not fit the context window; with `overflow="drop_oldest"` only if it
                does not fit alone, with the system message.
            Error: what `Pipeline.generate` raises.
        """
        requested = now()
        keep = one_of("on_cancel", self.on_cancel if on_cancel is None else on_cancel, get_args(OnCancel)) == "keep"
        messages = self._encoder.normalize(message)
        with self._turn:
            self._await_previous_turn()
            self._model.engine.check_open()
            tools = Tools.of((), tool_choice) if self._tools is None else self._tools.choosing(tool_choice)
            config = constrained(GenerationConfig.of(config, options), tools)
            conversation = self._now().with_messages(messages, self._encoder)
            check_turn(conversation.pending)
            conversation, added, dropped = self._fit_to_window(conversation, config)
            answer = ChatMessage(role="assistant", content="")
            turn = Turn(conversation.pending, answer, added.ids, added.ids[:0], added.whole)
            reply = ReplyOptions(
                requested,
                deadline=None if timeout is None else requested + seconds("timeout", timeout),
                on_prefill=on_prefill,
                on_end=lambda result: self._end(conversation, dropped, turn, result, keep),
                tools=tools,
            )
            stream = self._model.engine.submit(
                Submission(conversation.prompt(added), config, reply, continued=len(conversation.ids))
            )
            # The channel, not the stream: a stream that its reader drops must still cancel itself.
            self._running = stream.channel
            return stream

    # -- other ways to continue --------------------------------------------------------------------------------------

    def rewind(self, turns: int = 1) -> None:
        """Take back the last turns: the user's messages and their replies. The rest stays in the cache.

        Args:
            turns: number of turns; 0 takes back nothing.

        Raises:
            ConfigError: there are fewer turns.
            StreamError: a reply is still being generated.
        """
        with self._turn:
            self._await_previous_turn()
            conversation = self._now()
            note = ", the turns of this chat"
            self._set(
                conversation.rewind(whole_number("turns", turns, least=0, most=len(conversation.turns), note=note))
            )

    def truncate(self, tokens: int) -> int:
        """Keep the first ids of the conversation only. The kept part stays in the cache.

        Args:
            tokens: number of ids to keep. A cut inside a reply keeps the reply up to the cut; a cut inside a user's
                message drops that message.

        Returns:
            The number of ids that were kept.

        Raises:
            ConfigError: the conversation has fewer ids.
            StreamError: a reply is still being generated.
        """
        with self._turn:
            self._await_previous_turn()
            conversation = self._now()
            most, note = len(conversation.ids), ", the tokens of this chat"
            tokens = whole_number("tokens", tokens, least=0, most=most, note=note)
            kept = conversation.truncate(tokens, functools.partial(self._model.tokenizer.decode, final=False))
            self._set(kept)
            return len(kept.ids)

    def fork(self) -> Chat:
        """A second chat that continues from here. Both find the common part in the cache.

        Raises:
            StreamError: a reply is still being generated.
        """
        with self._turn:
            self._await_previous_turn()
            branch = Chat(self._model, tools=self._tools, overflow=self.overflow, on_cancel=self.on_cancel)
            branch.restore(self._now(), self._held_kv)
            return branch

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the chat to a file, whole or not at all; returns the size of the file in bytes.

        With `backend="infer_request"` its keys and values are written too, so that the next turn need not compute
        them, in this process or another. `Pipeline.load_chat` reads the file.

        Raises:
            StreamError: a reply is still being generated.
            SnapshotError: it cannot be written.
            TypeError: `path` is not a path.
        """
        os.fspath(path)
        with self._turn:
            self._await_previous_turn()
            conversation = self._now()
            # The next turn computes the last token in any case.
            entry = self._model.engine.export_kv(conversation.ids[:-1]) or KVEntry.empty()
            values = {**conversation.to_dict(), "overflow": self.overflow, "on_cancel": self.on_cancel}
            if self._tools is not None:
                values["tools"] = list(self._tools.functions)
            fingerprint = self._model.fingerprint
            return snapshot.write(path, snapshot.Snapshot("chat", fingerprint, conversation.ids, entry, values))

    def restore(self, conversation: Conversation, entry: KVEntry | None = None) -> None:
        """Replace the conversation; `entry` is kept alive until the next turn has used it."""
        self._set(conversation)
        self._held_kv = entry

    def ids_to_park(self) -> NDArray[np.int64] | None:
        """Ids whose keys and values the next turn needs; None if they are held already."""
        # The next turn computes the last token in any case.
        return self._now().ids[:-1] if self._held_kv is None else None

    def hold(self, entry: KVEntry) -> None:
        """Keep an entry alive until the next turn has used it."""
        self._held_kv = entry

    # -- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, system: str | None, messages: Sequence[Message] | None) -> Conversation:
        """The conversation before the first turn."""
        empty = Conversation(end_ids=frozenset(self._model.info.eos_token_ids))
        if system is None and messages is None:
            return empty
        if system is not None and messages is not None:
            raise ConfigError("system contradicts messages: give the system message as the first of the messages.")
        if system is not None and not isinstance(system, str):
            raise TypeError(f"system must be a string, not {type(system).__name__}")
        if messages is not None and (isinstance(messages, str) or not isinstance(messages, Sequence)):
            raise TypeError(f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}")
        first = messages if messages is not None else [{"role": "system", "content": system}]
        conversation = empty.with_messages(self._encoder.normalize(first), self._encoder)
        if conversation.pending:
            self._encoder.added(conversation, conversation.pending)  # refuses what the template has no form for
        if self.overflow == "error":
            self._model.engine.check_room(GenerationConfig(), len(conversation.ids))
        return conversation

    def _now(self) -> Conversation:
        with self._lock:
            return self._conversation

    def _set(self, conversation: Conversation) -> None:
        with self._lock:
            self._conversation = conversation

    def _await_previous_turn(self) -> None:
        """Wait for a cancelled reply, which ends within one token; refuse if a reply is still wanted."""
        previous = self._running
        if previous is None or previous.ended:
            return
        if not previous.cancelled:
            raise StreamError("the reply to the previous turn is still coming; read it to its end or cancel it first.")
        previous.wait_ended()

    def _end(
        self,
        conversation: Conversation,
        dropped: Sequence[Turn],
        turn: Turn,
        result: GenerationResult | None,
        keep: bool,
    ) -> GenerationResult | None:
        """Add a turn that ended with a result.

        A turn that failed, or was cancelled before its first token, leaves the conversation as it was.
        """
        if result is None or not result.token_ids or (result.finish_reason in ("cancelled", "timeout") and not keep):
            return result
        answer = ChatMessage(role="assistant", content=result.text)
        if result.tool_calls:
            answer["tool_calls"] = calls_of(result.tool_calls)
        ended = replace(turn, answer=answer, reply=self._encoder.shown(result))
        self._set(conversation.with_turn(ended, result.metrics.reused_tokens or 0))
        self._held_kv = None
        if not dropped:
            return result
        return replace(result, dropped_messages=[message for turn in dropped for message in turn.messages])

    def _fit_to_window(
        self, conversation: Conversation, config: GenerationConfig
    ) -> tuple[Conversation, Added, tuple[Turn, ...]]:
        """The conversation that a turn continues, the ids that its messages add, and the turns dropped for it."""
        new = conversation.pending
        added = self._encoder.added(conversation, new)
        if self.overflow != "drop_oldest" or not conversation.turns:
            return conversation, added, ()
        window = self._model.engine.context_length
        least = config.max_new_tokens or config.min_new_tokens or 1
        room = config.max_new_tokens or max(least, min(_REPLY_TOKENS, window // _REPLY_SHARE))
        if len(conversation.prompt(added)) + room <= window:
            return conversation, added, ()
        answers_tools = new[0]["role"] == "tool"
        if not answers_tools:
            self._check_fits_alone(new, least, "the new message")
        # Each drop changes the ids right behind the system message, so that all that stays is prefilled again. Dropping
        # down to half of the window means that this happens once in many turns.
        most = min(window - room, window // 2) - (0 if added.whole else len(added.ids))
        count = conversation.oldest_to_drop(most, self._encoder, keep_last=answers_tools)
        shorter = conversation.without_oldest(count, self._encoder)
        _log.info("dropped the %d oldest turns of a chat; %d stay", count, len(shorter.turns))
        return shorter, self._encoder.added(shorter, new), conversation.turns[:count]

    def _check_fits_alone(self, new: Sequence[ChatMessage], reply: int, what: str) -> None:
        """Refuse messages that do not fit even with all turns dropped."""
        engine = self._model.engine
        tokens = len(self._encoder.first(self._now().system, new))
        if tokens + reply > engine.context_length:
            raise engine.overflow(
                f"{what} takes {tokens} tokens with the chat template around it, and the reply may take {reply}",
                tokens,
                reply,
                "Nothing that could be dropped would make room: shorten it, or ask for a shorter reply.",
            )
