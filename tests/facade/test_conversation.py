"""A conversation as a value: slices of known ids equal what re-encoding the messages gives."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ov_phi3 import Chat, ModelInfo, Tokenizer
from ov_phi3.conversation import Added, Conversation, Turn, TurnEncoder, user_message
from ov_phi3.text.messages import ChatMessage, normalize

# Words, so that a text has the same ids behind a line break as behind a control token.
WORDS = ("river", "stone", "Ada", "Rome", "capital", "seven", "why", "Paris", "unbelievable", "x")
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
systems = st.none() | texts
histories = st.lists(st.tuples(texts, texts, st.booleans()), max_size=6)
check = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Model:
    """A tokenizer, and conversations built with it turn by turn.

    Attributes:
        tokenizer: the tokenizer.
        encoder: encodes users' messages.
        end_ids: the model's end tokens.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.tokenizer = Tokenizer(info.path)
        self.encoder = TurnEncoder(self.tokenizer)
        self.end_ids = frozenset(info.eos_token_ids)
        self.vocab_size = info.vocab_size
        self.reply = lru_cache(self._reply)

    def _reply(self, text: str) -> tuple[int, ...]:
        """The ids that a model would generate for a text, with an end token."""
        user = {"role": "user", "content": "x"}
        before = self.tokenizer.encode_messages([user]).tolist()
        messages = [user, {"role": "assistant", "content": text}]
        whole = self.tokenizer.encode_messages(messages, add_generation_prompt=False).tolist()
        assert whole[: len(before)] == before
        rest = whole[len(before) :]
        return tuple(rest[: 1 + next(i for i, token in enumerate(rest) if token in self.end_ids)])

    def converse(self, system: str | None, history: list[tuple[str, str, bool]]) -> Conversation:
        """A conversation; a reply without an end token is one that ended at its length limit."""
        head = () if system is None else (ChatMessage(role="system", content=system),)
        conversation = Conversation(head, self.end_ids)
        for user, assistant, ended in history:
            reply = self.reply(assistant)
            ids = np.array(reply if ended else reply[:-1], dtype=np.int64)
            conversation = conversation.with_turn(self.turn(conversation, user, assistant, ids), 0)
        return conversation

    def turn(self, conversation: Conversation, user: str, assistant: str, ids: Any) -> Turn:
        """A turn that continues a conversation."""
        new = user_message(user)
        added = self.encoder.added(conversation, new).ids
        return Turn(new, ChatMessage(role="assistant", content=assistant), added, np.array(ids))

    def prompt(self, conversation: Conversation, user: str) -> list[int]:
        """The prompt of the next turn, by arithmetic."""
        return conversation.prompt(self.encoder.added(conversation, user_message(user))).tolist()

    def encoded(self, conversation: Conversation, user: str) -> list[int]:
        """The same, by encoding all messages again."""
        return self.tokenizer.encode_messages([*conversation.messages, {"role": "user", "content": user}]).tolist()


@pytest.fixture(scope="module", params=["demo_int4", "tiny_fp32"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(ModelInfo.from_dir(request.getfixturevalue(request.param)))


@check
@given(systems, histories, texts)
def test_turns_add_up(model: Model, system: str | None, history: Any, user: str) -> None:
    conversation = model.converse(system, history)
    assert model.prompt(conversation, user) == model.encoded(conversation, user)


@check
@given(systems, histories, st.none() | texts)
def test_messages_from_elsewhere(model: Model, system: str | None, history: Any, user: str | None) -> None:
    """They have the ids of turns that were generated, and of the rendered conversation."""
    expected = model.converse(system, [(*pair, False) for *pair, _ in history])
    messages = [*expected.messages, *([] if user is None else user_message(user))]
    read = Conversation(end_ids=model.end_ids).with_messages(normalize(messages), model.encoder)
    assert read.ids.tolist() == expected.ids.tolist()
    assert (read.messages, len(read.turns), read.system) == (messages, len(history), expected.system)
    assert read.pending == (() if user is None else user_message(user))
    if user is not None:
        assert model.prompt(expected, user) == model.tokenizer.encode_messages(messages).tolist()


@check
@given(systems, histories, texts, st.data())
def test_rewind(model: Model, system: str | None, history: Any, user: str, data: Any) -> None:
    count = data.draw(st.integers(0, len(history)))
    shorter = model.converse(system, history).rewind(count)
    expected = model.converse(system, history[: len(history) - count])
    assert shorter.ids.tolist() == expected.ids.tolist()
    assert shorter.messages == expected.messages
    assert model.prompt(shorter, user) == model.encoded(shorter, user)


@check
@given(systems, histories, texts, st.data())
def test_without_oldest(model: Model, system: str | None, history: Any, user: str, data: Any) -> None:
    count = data.draw(st.integers(0, len(history)))
    shorter = model.converse(system, history).without_oldest(count, model.encoder)
    expected = model.converse(system, history[count:])
    assert shorter.ids.tolist() == expected.ids.tolist()
    assert (shorter.messages, shorter.dropped_turns) == (expected.messages, count)
    assert model.prompt(shorter, user) == model.encoded(shorter, user)


@check
@given(systems, histories, st.data())
def test_the_fewest_oldest_turns_are_dropped(model: Model, system: str | None, history: Any, data: Any) -> None:
    """The rule of the docstring, tried count by count: the rest takes at most so many tokens, or nothing stays."""
    conversation = model.converse(system, history)
    most = data.draw(st.integers(-5, len(conversation.ids) + 5))

    def fits(count: int) -> bool:
        rest = conversation.without_oldest(count, model.encoder)
        return sum(len(turn.added) + len(rest._without_end(turn.reply)) for turn in rest.turns) <= most

    turns = len(conversation.turns)
    expected = next((count for count in range(1, turns) if fits(count)), turns)
    assert conversation.oldest_to_drop(most, model.encoder) == expected


@check
@given(systems, histories, st.data())
def test_truncate(model: Model, system: str | None, history: Any, data: Any) -> None:
    conversation = model.converse(system, history)
    ids = conversation.ids.tolist()
    tokens = data.draw(st.integers(0, len(ids)))
    shorter = conversation.truncate(tokens, model.tokenizer.decode)
    left = shorter.ids.tolist()
    assert len(left) <= tokens
    assert left == ids[: len(left)]
    for turn in shorter.turns:
        assert len(turn.reply)
    whole = conversation.turns[: len(shorter.turns)]
    assert [turn.new for turn in shorter.turns] == [turn.new for turn in whole]
    if shorter.turns and len(shorter.turns[-1].reply) < len(whole[-1].reply):
        assert shorter.turns[-1].answer["content"] == model.tokenizer.decode(shorter.turns[-1].reply)
        assert len(left) == tokens
    # Longer by one turn would be too long: its message and one id of its reply.
    for turn in conversation.turns[len(shorter.turns) :][:1]:
        assert len(conversation.rewind(len(history) - len(whole)).prompt(Added(turn.added))) >= tokens


def test_truncate_at_the_end_of_a_reply(model: Model) -> None:
    """The id behind a reply belongs to the next turn, so the reply stays without its own end token."""
    conversation = model.converse(None, [("river", "stone", True), ("why", "Ada", True)])
    first = conversation.turns[0]
    tokens = len(first.added) + len(first.reply) - 1
    shorter = conversation.truncate(tokens, model.tokenizer.decode)
    assert shorter.ids.tolist() == conversation.ids[:tokens].tolist()
    assert shorter.messages == conversation.messages[:2]


def test_truncate_inside_of_messages(model: Model) -> None:
    conversation = model.converse("Be brief.", [("river", "stone stone", True), ("why", "Ada Rome Paris", True)])
    last = conversation.turns[-1]
    whole = len(conversation.ids)
    inside_reply = conversation.truncate(whole - len(last.reply) + 2, model.tokenizer.decode)
    assert inside_reply.turns[-1].reply.tolist() == last.reply[:2].tolist()
    inside_message = conversation.truncate(whole - len(last.reply) - 1, model.tokenizer.decode)
    assert inside_message.messages == conversation.messages[:3]
    assert conversation.truncate(whole, model.tokenizer.decode).messages == conversation.messages
    assert conversation.truncate(1, model.tokenizer.decode).messages == conversation.messages[:1]


@check
@given(systems, histories, st.integers(0, 3))
def test_to_and_from_values(model: Model, system: str | None, history: Any, dropped: int) -> None:
    conversation = replace(model.converse(system, history), dropped_turns=dropped)
    values = json.loads(json.dumps(conversation.to_dict()))
    read = Conversation.from_dict(values, model.encoder, model.end_ids, model.vocab_size)
    assert read.ids.tolist() == conversation.ids.tolist()
    assert (read.messages, read.dropped_turns) == (conversation.messages, dropped)
    assert read.to_dict() == conversation.to_dict()


def test_values_of_an_earlier_version(model: Model) -> None:
    conversation = model.converse("Be brief.", [("river", "stone", True)])
    reply = list(model.reply("stone"))
    values = {"system": "Be brief.", "turns": [["river", "stone", reply]], "dropped": 0}
    read = Conversation.from_dict(values, model.encoder, model.end_ids, model.vocab_size)
    assert (read.ids.tolist(), read.messages) == (conversation.ids.tolist(), conversation.messages)


@pytest.mark.parametrize(
    "change",
    [
        {"system": 5},
        {"turns": 5},
        {"turns": [["a", "b"]]},
        {"turns": [["a", "b", []]]},
        {"turns": [["a", 5, [1]]]},
        {"turns": [["a", "b", [-1]]]},
        {"dropped": "x"},
    ],
)
def test_values_of_something_else(model: Model, change: dict[str, Any]) -> None:
    values = {**model.converse(None, [("river", "stone", True)]).to_dict(), **change}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Conversation.from_dict(values, model.encoder, model.end_ids, model.vocab_size)


def test_a_fork_shares_the_value(model: Model) -> None:
    conversation = model.converse("Be brief.", [("river", "stone", True)])
    before = conversation.ids.tolist()
    other = conversation.with_turn(model.turn(conversation, "why", "Ada", model.reply("Ada")), 3)
    assert conversation.ids.tolist() == before
    assert len(conversation.turns) == 1
    assert other.turns[0] is conversation.turns[0]
    assert (other.reused_tokens, conversation.reused_tokens) == (3, 0)


class TestDropOldest:
    """In a chat: the oldest of 182 short turns are dropped at once."""

    def full(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Chat, list[int]]:
        """A chat whose next turn drops, and the calls of the tokenizer from now on."""
        calls: list[int] = []
        pipe, _ = make([[9690]], window=10_000)
        chat = pipe.chat(system="Be brief.", overflow="drop_oldest")
        for number in range(182):
            chat.send(f"Turn {number}.", max_new_tokens=1)
        window = len(chat.token_ids) + 8
        object.__setattr__(pipe.engine._limits, "context_length", window)  # as if the window were full now
        real = Tokenizer.encode_segments

        def counted(tokenizer: Tokenizer, segments: Any) -> Any:
            calls.append(1)
            return real(tokenizer, segments)

        monkeypatch.setattr(Tokenizer, "encode_segments", counted)
        return chat, calls

    def test_is_linear_in_the_turns(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        chat, calls = self.full(make, monkeypatch)
        result = chat.send("One more.", max_new_tokens=4)
        assert result.dropped_messages
        assert len(calls) < 2 * 182

    def test_half_of_the_window_is_free_afterwards(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the rule of `Pipeline.chat`, tried turn by turn."""
        chat, _ = self.full(make, monkeypatch)
        engine, encoder = chat._model.engine, TurnEncoder(chat._model.tokenizer)
        before, window, room = chat._conversation, engine.context_length, 4
        added = encoder.added(before, user_message("One more.")).ids
        most = min(window - room, window // 2) - len(added)
        result = chat.send("One more.", max_new_tokens=room)
        expected = next(
            count for count in range(1, 183) if len(before.without_oldest(count, encoder).ids) <= most or count == 182
        )
        assert len(result.dropped_messages) == 2 * expected
        assert chat.dropped_turns == expected
        assert chat.messages[1]["content"] == f"Turn {expected}."
