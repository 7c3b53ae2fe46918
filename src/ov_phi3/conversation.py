"""A conversation as a value: its messages, and the exact token ids of every turn.

The ids of a reply are kept as they were generated and never encoded from its text again: decoded text can encode to
other ids, and then the prefix cache no longer matches. Every turn keeps the ids that it added, so taking turns back,
dropping the oldest ones, cutting and saving are slices of known ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.text.tokenizer import as_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.text.tokenizer import Tokenizer

__all__ = ["Conversation", "Turn", "TurnEncoder"]


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn that has ended: the user's message and its reply.

    Attributes:
        user: the text of the user's message.
        assistant: the text of the reply.
        added: ids from the end of the previous reply, or from the start of the conversation, to the reply; int64,
            shape [tokens]. The first turn's hold the system message too.
        reply: ids of the reply as generated, end token included; int64, shape [tokens].
    """

    user: str
    assistant: str
    added: NDArray[np.int64]
    reply: NDArray[np.int64]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The two messages."""
        return [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.assistant}]


class TurnEncoder:
    """Encodes the user's messages of conversations, with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def first(self, system: str | None, user: str) -> NDArray[np.int64]:
        """Ids of a prompt that consists of a system message, if there is one, and a user's message."""
        return self._tokenizer.encode_messages([*_system_message(system), {"role": "user", "content": user}])

    def next(self, user: str) -> NDArray[np.int64]:
        """Ids behind a reply without its end token: the template's end of a reply, and a user's message."""
        template = self._tokenizer.template
        return self._tokenizer.encode_segments(template.continuation([{"role": "user", "content": user}]))

    def added(self, conversation: Conversation, user: str) -> NDArray[np.int64]:
        """Ids that a message adds to a conversation."""
        return self.next(user) if conversation.turns else self.first(conversation.system, user)


@dataclass(frozen=True)
class Conversation:
    """A conversation between two turns. Never changed: a fork shares it, and a failed turn leaves it as it was.

    Attributes:
        system: the text of the system message, or None.
        end_ids: the model's end tokens. The end token of a reply need not be the one that the chat template writes, so
            it is removed when the conversation continues.
        turns: the turns, oldest first.
        reused_tokens: prompt tokens that the last turn took from the cache.
        dropped_turns: turns that were dropped to make room.
    """

    system: str | None = None
    end_ids: frozenset[int] = frozenset()
    turns: tuple[Turn, ...] = ()
    reused_tokens: int = field(default=0, compare=False)
    dropped_turns: int = 0

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """All token ids, int64, shape [tokens]."""
        parts = [part for turn in self.turns for part in (turn.added, turn.reply)]
        # A reply's own end token goes when a turn follows it.
        parts[1:-1:2] = [self._without_end(reply) for reply in parts[1:-1:2]]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, as new dicts."""
        return _system_message(self.system) + [message for turn in self.turns for message in turn.messages]

    def prompt(self, added: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of the prompt of a new turn, which adds these."""
        return np.concatenate([self._without_end(self.ids), added])

    def with_turn(self, turn: Turn, reused_tokens: int) -> Conversation:
        """With one more turn."""
        return replace(self, turns=(*self.turns, turn), reused_tokens=reused_tokens)

    def rewind(self, turns: int) -> Conversation:
        """Without the last turns."""
        return replace(self, turns=self.turns[: len(self.turns) - turns])

    def without_oldest(self, count: int, encoder: TurnEncoder) -> Conversation:
        """Without the oldest turns. Only the turn that becomes the first one is encoded again."""
        rest = self.turns[count:]
        if count and rest:
            rest = (replace(rest[0], added=encoder.first(self.system, rest[0].user)), *rest[1:])
        return replace(self, turns=rest, dropped_turns=self.dropped_turns + count)

    def oldest_to_drop(self, most: int, encoder: TurnEncoder) -> int:
        """The fewest oldest turns without which the rest takes at most `most` tokens; all of them if none does."""
        tokens = np.array([len(turn.added) + len(self._without_end(turn.reply)) for turn in self.turns])
        from_turn = np.append(np.cumsum(tokens[::-1])[::-1], 0)  # tokens of this turn and all later ones
        for count in range(1, len(self.turns)):
            first = self.turns[count]
            # Encoded only if the later turns leave room, which happens once or twice.
            behind = int(from_turn[count]) - len(first.added)
            if behind <= most and behind + len(encoder.first(self.system, first.user)) <= most:
                return count
        return len(self.turns)

    def truncate(self, tokens: int, decode: Callable[[NDArray[np.int64]], str]) -> Conversation:
        """The first ids only.

        A cut inside a reply keeps the reply up to the cut, with the text that `decode` gives. A cut inside a user's
        message drops that message.
        """
        turns: list[Turn] = []
        left = tokens
        for turn in self.turns:
            left -= len(turn.added)
            if left < 1:
                break
            if left < len(turn.reply):
                turns.append(replace(turn, reply=turn.reply[:left], assistant=decode(turn.reply[:left])))
                break
            turns.append(turn)
            left -= len(self._without_end(turn.reply))  # the next turn continues without the reply's end token
        return replace(self, turns=tuple(turns))

    def _without_end(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids[:-1] if len(ids) and int(ids[-1]) in self.end_ids else ids

    # -- to and from a file ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "system": self.system,
            "turns": [[turn.user, turn.assistant, turn.reply.tolist()] for turn in self.turns],
            "dropped": self.dropped_turns,
        }

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], encoder: TurnEncoder, end_ids: Collection[int], vocab_size: int
    ) -> Conversation:
        """From what `to_dict` gave; encodes every user's message once.

        Raises:
            KeyError, TypeError, ValueError: not such values.
        """
        system, rows = values["system"], values["turns"]
        if not (system is None or isinstance(system, str)) or not isinstance(rows, Sequence):
            raise TypeError("a system message is a text, and the turns are a list")
        conversation = cls(system, frozenset(end_ids), dropped_turns=int(values["dropped"]))
        for user, assistant, reply in rows:
            if not (isinstance(user, str) and isinstance(assistant, str) and reply):
                raise TypeError("a message is a text, and a reply has ids")
            added = encoder.added(conversation, user)
            conversation = conversation.with_turn(Turn(user, assistant, added, as_ids(reply, vocab_size)), 0)
        return conversation


def _system_message(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]
