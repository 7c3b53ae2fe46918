"""A conversation as a value: its messages, and the exact token ids of every turn.

The ids of a reply are kept as they were generated and never encoded from its text again: decoded text can encode to
other ids, and then the prefix cache no longer matches. Every turn keeps the ids that it added, so taking turns back,
dropping the oldest ones, cutting and saving are slices of known ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ov_phi3.errors import TemplateError
from ov_phi3.text.messages import ChatMessage, check_final, normalize
from ov_phi3.text.prompt import describe_tools
from ov_phi3.text.tokenizer import as_ids
from ov_phi3.text.tools import name_results, written_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.generation.results import GenerationResult
    from ov_phi3.text.messages import Message
    from ov_phi3.text.tokenizer import Tokenizer
    from ov_phi3.text.tools import Tools

__all__ = ["Added", "Conversation", "Turn", "TurnEncoder", "check_turn", "user_message"]


def user_message(text: str) -> tuple[ChatMessage, ...]:
    """The messages of a turn that is a text of the user's."""
    return (ChatMessage(role="user", content=text),)


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn that has ended: the messages that were new, and the reply.

    Attributes:
        new: the messages since the previous reply, such as one of the user's, or the results of tools.
        answer: the assistant's message.
        added: ids from the end of the previous reply, or from the start of the conversation, to the reply; int64,
            shape [tokens]. The first turn's hold the system message too.
        reply: ids of the reply as generated, end token included; int64, shape [tokens].
        whole: `added` is the whole prompt, because the chat template writes the earlier turns otherwise by now. The ids
            of earlier turns are then those of the conversation as it was.
    """

    new: tuple[ChatMessage, ...]
    answer: ChatMessage
    added: NDArray[np.int64]
    reply: NDArray[np.int64]
    whole: bool = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages of the turn, as copies."""
        return _copies((*self.new, self.answer))

    @property
    def answers_tools(self) -> bool:
        """Whether it begins with the result of a tool, which belongs to the reply before."""
        return bool(self.new) and self.new[0]["role"] == "tool"


class Added(NamedTuple):
    """The ids that new messages add to a conversation.

    Attributes:
        ids: int64, shape [tokens].
        whole: they are the whole prompt, see `Turn.whole`.
    """

    ids: NDArray[np.int64]
    whole: bool = False


class TurnEncoder:
    """Encodes the messages of conversations, with one tokenizer, its chat template, and the tools it describes."""

    def __init__(self, tokenizer: Tokenizer, tools: Tools | None = None) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self.may_change = tokenizer.template.jinja is not None  # what it writes, from one day to the next

    def normalize(self, messages: str | Message | Sequence[Message]) -> tuple[ChatMessage, ...]:
        """The messages in one form: a string is the user's, a mapping is one message.

        Raises:
            TemplateError: a message that the chat template has no form for.
            TypeError: neither of these, nor a list of messages.
        """
        if isinstance(messages, str):
            return user_message(str(messages))
        roles = self._tokenizer.template.roles
        if isinstance(messages, Mapping):
            return tuple(normalize([messages], roles))
        if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray)):
            raise TypeError(f"a turn is a string, a message or a list of messages, not {type(messages).__name__}")
        return tuple(normalize(cast("Sequence[Message]", messages), roles))

    def first(self, system: Sequence[ChatMessage], new: Sequence[ChatMessage]) -> NDArray[np.int64]:
        """Ids of a prompt that consists of system messages, if there are any, and the first new messages."""
        messages: Sequence[Message] = [*system, *new]
        if self._tools is not None:
            messages = describe_tools(messages, self._tokenizer, self._tools)
        if not messages:
            template = self._tokenizer.template
            return self._tokenizer.encode_segments(template.beginning(()) + template.following(()))
        return self._tokenizer.encode_messages(messages)

    def added(self, conversation: Conversation, new: Sequence[ChatMessage]) -> Added:
        """What messages add to a conversation.

        Behind a reply: the template's end of the reply and the new messages. A template that writes earlier turns
        otherwise by now, for instance without their reasoning, gives the whole prompt instead.
        """
        if not conversation.turns:
            return Added(self.first(conversation.system, new))
        tokenizer, history, tools = self._tokenizer, conversation.answered, self._tools
        segments = tokenizer.template.continuation(new, describe_tools(history, tokenizer, tools) if tools else history)
        if segments is None:
            return Added(self.first((), [*history, *new]), True)
        if segments and not segments[0].control:  # text right behind the reply
            text = tokenizer.encode_continuation(segments[0].text)
            return Added(np.concatenate([text, tokenizer.encode_segments(segments[1:])]))
        return Added(tokenizer.encode_segments(segments))

    def reply(self, answer: ChatMessage) -> NDArray[np.int64]:
        """Ids of an assistant's message that was not generated here, as they lie in the rendered conversation.

        They come behind the assistant's header and end before the template's end of a message.
        """
        tokenizer = self._tokenizer
        question = user_message("x")
        before = tokenizer.encode_messages(question)
        whole, one, other = (
            tokenizer.encode_segments(tokenizer.template.beginning([*question, message]))
            for message in (answer, *(ChatMessage(role="assistant", content=text) for text in ("7", "b")))
        )
        end = next((n for n in range(min(len(one), len(other))) if one[-1 - n] != other[-1 - n]), 0)
        if np.array_equal(whole[: len(before)], before) and np.array_equal(whole[len(whole) - end :], one[-end:]):
            return whole[len(before) : len(whole) - end]
        return tokenizer.encode_continuation(written_out(answer)["content"])  # header or end were merged with the text

    def shown(self, result: GenerationResult) -> NDArray[np.int64]:
        """The ids of a reply as far as its reader saw it.

        They are the ids as generated, up to the stop string that cut the text. A token that holds the end of the text
        and the beginning of the stop string is left out, and its part of the text is encoded by itself.
        """
        if result.stop_string is None or result.tool_calls:
            return np.array(result.token_ids, dtype=np.int64)
        tokenizer = self._tokenizer
        structured = result.config.structure is not None
        decoder = tokenizer.stream_decoder(keep_space=structured, after=result.prompt_token_ids)
        kept, kept_text, text = 0, "", ""
        for index, token_id in enumerate(result.token_ids, 1):
            if kept_text == result.text:
                break
            text += decoder.add([token_id])
            if result.text.startswith(text) and not decoder.incomplete:
                kept, kept_text = index, text
        rest = result.text[len(kept_text) :]
        encode = tokenizer.encode_continuation if kept else tokenizer.encode
        encoded = encode(rest).tolist() if rest else []
        return np.array([*result.token_ids[:kept], *encoded], dtype=np.int64)


@dataclass(frozen=True)
class Conversation:
    """A conversation between two turns. Never changed: a fork shares it, and a failed turn leaves it as it was.

    Attributes:
        system: the system messages that it begins with.
        end_ids: the model's end tokens. The end token of a reply need not be the one that the chat template writes, so
            it is removed when the conversation continues.
        turns: the turns, oldest first.
        pending: messages at the end that have no reply yet; the next turn begins with them.
        reused_tokens: prompt tokens that the last turn took from the cache.
        dropped_turns: turns that were dropped to make room.
    """

    system: tuple[ChatMessage, ...] = ()
    end_ids: frozenset[int] = frozenset()
    turns: tuple[Turn, ...] = ()
    pending: tuple[ChatMessage, ...] = ()
    reused_tokens: int = field(default=0, compare=False)
    dropped_turns: int = 0

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """All token ids, int64, shape [tokens]."""
        parts = [part for turn in self.turns[self._start :] for part in (turn.added, turn.reply)]
        # A reply's own end token goes when a turn follows it.
        parts[1:-1:2] = [self._without_end(reply) for reply in parts[1:-1:2]]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    @property
    def _start(self) -> int:
        """Index of the turn with which the ids begin: the last one that rendered the whole prompt, or the first."""
        return max((index for index, turn in enumerate(self.turns) if turn.whole), default=0)

    @property
    def answered(self) -> tuple[ChatMessage, ...]:
        """All messages but the pending ones."""
        turns = [message for turn in self.turns for message in (*turn.new, turn.answer)]
        return (*self.system, *turns)

    @property
    def all_messages(self) -> tuple[ChatMessage, ...]:
        """All messages."""
        return (*self.answered, *self.pending)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, as copies."""
        return _copies(self.all_messages)

    def prompt(self, added: Added) -> NDArray[np.int64]:
        """The ids of the prompt of a new turn, which adds these."""
        if added.whole:
            return added.ids
        ids = self.ids
        if self.turns and len(self.turns[-1].reply):  # behind an empty reply, the last id is that of a header
            ids = self._without_end(ids)
        return np.concatenate([ids, added.ids])

    def with_turn(self, turn: Turn, reused_tokens: int) -> Conversation:
        """With one more turn, which has answered the pending messages."""
        return replace(self, turns=(*self.turns, turn), pending=(), reused_tokens=reused_tokens)

    def with_messages(self, messages: Sequence[ChatMessage], encoder: TurnEncoder) -> Conversation:
        """With messages from elsewhere: an assistant's ends a turn, those behind the last one are pending.

        Raises:
            TemplateError, PromptError: the chat template does not accept them.
        """
        conversation = self
        for message in name_results(messages, self.all_messages):
            if message["role"] == "system" and not (conversation.turns or conversation.pending):
                conversation = replace(conversation, system=(*conversation.system, message))
            elif message["role"] == "assistant":
                new = conversation.pending
                added = encoder.added(conversation, new)
                turn = Turn(new, message, added.ids, encoder.reply(message), added.whole)
                conversation = conversation.with_turn(turn, conversation.reused_tokens)
            else:
                conversation = replace(conversation, pending=(*conversation.pending, message))
        return conversation

    def rewind(self, turns: int) -> Conversation:
        """Without the last turns; also without pending messages, unless it is for 0 turns."""
        if not turns:
            return self
        return replace(self, turns=self.turns[: len(self.turns) - turns], pending=())

    def without_oldest(self, count: int, encoder: TurnEncoder) -> Conversation:
        """Without the oldest turns. Only the turn that becomes the first one is encoded again, and whole prompts."""
        rest = self.turns[count:]
        if count and any(turn.whole for turn in rest):
            shorter = replace(self, turns=(), dropped_turns=self.dropped_turns + count)
            for turn in rest:
                added = encoder.added(shorter, turn.new)
                ended = replace(turn, added=added.ids, whole=added.whole)
                shorter = replace(shorter, turns=(*shorter.turns, ended))
            return shorter
        if count and rest:
            rest = (replace(rest[0], added=encoder.first(self.system, rest[0].new)), *rest[1:])
        return replace(self, turns=rest, dropped_turns=self.dropped_turns + count)

    def oldest_to_drop(self, most: int, encoder: TurnEncoder, *, keep_last: bool = False) -> int:
        """The fewest oldest turns without which the rest takes at most `most` tokens; all of them if none does.

        A turn that answers tools is dropped with the turn that called them.

        Args:
            most: tokens that may stay.
            encoder: encodes the turn that becomes the first one.
            keep_last: the next turn answers tools that the last one called, so that one stays in any case.
        """
        tokens, before = np.zeros(len(self.turns), np.int64), 0
        for index, turn in enumerate(self.turns):
            added = max(len(turn.added) - before, 0) if turn.whole else len(turn.added)
            tokens[index] = added + len(self._without_end(turn.reply))
            before += int(tokens[index])
        from_turn = np.append(np.cumsum(tokens[::-1])[::-1], 0)  # tokens of this turn and all later ones
        largest = 0
        for count in range(1, len(self.turns)):
            first = self.turns[count]
            if first.answers_tools:
                continue
            largest = count
            # Encoded only if the later turns leave room, which happens once or twice.
            behind = int(from_turn[count]) - (0 if first.whole else len(first.added))
            if behind <= most and behind + len(encoder.first(self.system, first.new)) <= most:
                return count
        return largest if keep_last else len(self.turns)

    def truncate(self, tokens: int, decode: Callable[[NDArray[np.int64]], str]) -> Conversation:
        """The first ids only.

        A cut inside a reply keeps the reply up to the cut, with the text that `decode` gives. A cut inside a user's
        message drops that message.
        """
        if tokens == len(self.ids):
            return self
        start = self._start
        if start and tokens <= len(self.turns[start].added):
            earlier = replace(self, turns=self.turns[:start], pending=())
            return earlier.truncate(min(tokens, len(earlier.ids)), decode)
        turns = list(self.turns[:start])
        left = tokens
        for turn in self.turns[start:]:
            left -= len(turn.added)
            if left < 1:
                break
            if left < len(turn.reply):
                reply = turn.reply[:left]
                turns.append(replace(turn, reply=reply, answer=ChatMessage(role="assistant", content=decode(reply))))
                break
            turns.append(turn)
            left -= len(self._without_end(turn.reply))  # the next turn continues without the reply's end token
        return replace(self, turns=tuple(turns), pending=())

    def _without_end(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids[:-1] if len(ids) and int(ids[-1]) in self.end_ids else ids

    # -- to and from a file ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "system": _copies(self.system),
            "turns": [[_copies(turn.new), *_copies((turn.answer,)), turn.reply.tolist()] for turn in self.turns],
            # A chat template with the date in it gives other ids tomorrow.
            "added": [[turn.added.tolist(), turn.whole] for turn in self.turns],
            "pending": _copies(self.pending),
            "dropped": self.dropped_turns,
        }

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], encoder: TurnEncoder, end_ids: Collection[int], vocab_size: int
    ) -> Conversation:
        """From what `to_dict` gave.

        Values in which system message, user's message and reply are texts are those of earlier versions. Where the ids
        that turns added are missing, their messages are encoded.

        Raises:
            KeyError, TypeError, ValueError: not such values.
        """
        system, rows = values["system"], values["turns"]
        if not isinstance(rows, Sequence):
            raise TypeError("the turns are a list")
        conversation = cls(
            _saved_messages(system, "system", encoder), frozenset(end_ids), dropped_turns=int(values["dropped"])
        )
        saved_ids = (encoder.may_change and values.get("added")) or [None] * len(rows)
        for (saved_new, saved_answer, reply), ids in zip(rows, saved_ids, strict=True):
            new = _saved_messages(saved_new, "user", encoder)
            (answer,) = _saved_messages(saved_answer, "assistant", encoder)
            if not reply and answer["content"]:
                raise TypeError("a reply has ids")
            added = encoder.added(conversation, new) if ids is None else Added(as_ids(ids[0], vocab_size), bool(ids[1]))
            turn = Turn(new, answer, added.ids, as_ids(reply, vocab_size), added.whole)
            conversation = conversation.with_turn(turn, 0)
        return replace(conversation, pending=_saved_messages(values.get("pending"), "user", encoder))


def _saved_messages(value: object, role: str, encoder: TurnEncoder) -> tuple[ChatMessage, ...]:
    """Messages as they were saved: None, a text, a message, or a list of messages."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (ChatMessage(role=role, content=value),)
    if not isinstance(value, (Mapping, list)):
        raise TypeError("a message is a text or a dict")
    return encoder.normalize(value)


def _copies(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    return [copy.deepcopy(dict(message)) for message in messages]


def check_turn(new: Sequence[ChatMessage]) -> None:
    """Check that a turn has messages to answer.

    Raises:
        TemplateError: there is none, or the last one is the assistant's.
    """
    if not new:
        raise TemplateError("there is nothing to answer: give a text, a message or a list of messages.")
    check_final(new, continue_final_message=False)
