"""Chats that began elsewhere, turns that are messages, and turns that a stop string ended; on both backends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import ChatTemplate, ConfigError, ContextOverflowError, Pipeline, TemplateError

HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]
NEXT = {"role": "user", "content": "And of Japan?", "name": "Ada"}
SENT = {"role": "user", "content": "And of Japan?"}


# -- conversations that began elsewhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["And of Japan?", NEXT, [NEXT]])
def test_a_chat_continues_messages(tiny: Pipeline, sent: Any) -> None:
    chat = tiny.chat(messages=HISTORY)
    assert chat.messages == HISTORY
    assert chat.token_ids.tolist() == tiny.encode(HISTORY, continue_final_message=True).tolist()
    result = chat.send(sent, max_new_tokens=4)
    assert result.prompt_token_ids == tiny.encode([*HISTORY, SENT]).tolist()
    assert chat.messages == [*HISTORY, SENT, {"role": "assistant", "content": result.text}]
    assert chat.token_ids.tolist() == result.prompt_token_ids + result.token_ids


def test_messages_without_a_reply_wait_for_the_next_turn(tiny: Pipeline) -> None:
    expected = tiny.generate([*HISTORY, SENT], max_new_tokens=4)
    chat = tiny.chat(messages=[*HISTORY, NEXT])
    assert chat.messages == [*HISTORY, SENT]
    assert chat.fork().send([], max_new_tokens=4).token_ids == expected.token_ids
    both = chat.fork().send("Please.", max_new_tokens=4)
    please = {"role": "user", "content": "Please."}
    assert both.prompt_token_ids == tiny.encode([*HISTORY, SENT, please]).tolist()
    chat.rewind(0)
    assert chat.messages == [*HISTORY, SENT]
    chat.rewind()
    assert chat.messages == HISTORY[:1]
    with pytest.raises(TemplateError, match="nothing to answer"):
        chat.send([])


def test_an_answer_in_a_turn_ends_a_turn_of_its_own(tiny: Pipeline) -> None:
    chat = tiny.chat(system="Be brief.")
    result = chat.send([*HISTORY[1:], NEXT], max_new_tokens=4)
    assert result.prompt_token_ids == tiny.encode([*HISTORY, SENT]).tolist()
    chat.rewind()
    assert chat.messages == HISTORY
    with pytest.raises(TemplateError, match="nothing to answer"):
        chat.send(HISTORY[1:])
    assert chat.messages == HISTORY


def test_a_chat_may_begin_with_the_assistant(tiny: Pipeline) -> None:
    hello = {"role": "assistant", "content": "Hello, I am Phi."}
    for messages in ([hello], [HISTORY[0], hello]):
        chat = tiny.chat(messages=messages)
        result = chat.send("Hi", max_new_tokens=2)
        user = {"role": "user", "content": "Hi"}
        assert result.prompt_token_ids == tiny.encode([*messages, user]).tolist()


def test_developer_is_system(tiny: Pipeline) -> None:
    chat = tiny.chat(messages=[{"role": "developer", "content": "Be brief."}])
    assert chat.messages == HISTORY[:1]
    assert chat.send("Hi", max_new_tokens=2).prompt_token_ids == tiny.encode([*HISTORY[:1], user("Hi")]).tolist()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"system": "x", "messages": HISTORY}, ConfigError, "system contradicts messages"),
        ({"messages": "Hi"}, TypeError, "list of"),
        ({"messages": HISTORY[0]}, TypeError, "list of"),
        ({"system": 5}, TypeError, "string"),
        ({"messages": [{"role": "usr", "content": "x"}]}, TemplateError, "Did you mean 'user'"),
        ({"messages": [user("x " * 5000), HISTORY[2]]}, ContextOverflowError, "no room"),
    ],
)
def test_refused_beginnings(tiny_pipe: Pipeline, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_pipe.chat(**options)


@pytest.mark.parametrize("message", [None, 5, b"Hi", ["Hi"], [5]])
def test_turns_of_a_wrong_type(tiny_pipe: Pipeline, message: Any) -> None:
    chat = tiny_pipe.chat(messages=HISTORY)
    with pytest.raises(TypeError):
        chat.send(message)
    assert chat.messages == HISTORY


def test_saved_and_loaded(tiny: Pipeline, tmp_path: Path) -> None:
    chat = tiny.chat(messages=[*HISTORY, NEXT])
    chat.save(tmp_path / "chat.kv")
    loaded = tiny.load_chat(tmp_path / "chat.kv")
    assert (loaded.messages, loaded.token_ids.tolist()) == (chat.messages, chat.token_ids.tolist())
    assert loaded.send([], max_new_tokens=4).token_ids == chat.send([], max_new_tokens=4).token_ids
    chat.save(tmp_path / "chat.kv")
    assert tiny.load_chat(tmp_path / "chat.kv").messages == chat.messages


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tiny_fp32: Path, device: str) -> Iterator[Pipeline]:
    """With a chat template that has a role for tools."""
    template = ChatTemplate("tools", roles=("system", "user", "assistant", "tool"), header="<|user|>{role}: ")
    with ov_phi3.load(tiny_fp32, device=device, context_length=128, template=template) as pipe:
        yield pipe


def test_a_history_longer_than_the_window_is_dropped(narrow: Pipeline) -> None:
    history = [HISTORY[0], *HISTORY[1:] * 10]
    chat = narrow.chat(messages=history, overflow="drop_oldest")
    result = chat.send("Hi", max_new_tokens=4)
    count = len(result.dropped_messages)
    assert result.dropped_messages == history[1 : 1 + count]
    assert chat.messages[:-2] == [history[0], *history[1 + count :]]
    assert len(result.prompt_token_ids) <= 64
    with pytest.raises(ContextOverflowError):
        narrow.chat(messages=history)


def test_a_tools_result_stays_with_its_call(narrow: Pipeline) -> None:
    """Turns that answer tools are dropped together with the turn that called them, and never from the end."""
    tool = {"role": "tool", "content": "5 degrees in Oslo today"}
    called = {"role": "assistant", "content": "get_weather(Oslo) get_weather(Rome)"}
    exchange = [user("Is it warm in Oslo?"), called, tool, called, tool, called]
    for count in range(2, 8):
        chat = narrow.chat(messages=exchange * count, overflow="drop_oldest")
        if len(chat.token_ids) > 108:
            break
    branch = chat.fork()
    result = chat.send("Really?", max_new_tokens=4)
    assert result.dropped_messages
    assert len(result.dropped_messages) % 6 == 0
    result = branch.send(tool, max_new_tokens=4)
    assert result.dropped_messages == exchange * (count - 1)
    assert branch.messages[:-2] == exchange


# -- stop strings ----------------------------------------------------------------------------------------------------


def test_the_next_turn_goes_on_from_what_was_shown(demo: Pipeline) -> None:
    chat = demo.chat()
    result = chat.send("What is the capital of France?", stop=["Paris"])
    assert (result.text, result.stop_string) == ("The capital of France is ", "Paris")
    assert demo.tokenizer.decode(chat.token_ids[len(result.prompt_token_ids) :]) == result.text
    second = chat.send("And of Japan?", max_new_tokens=4)
    shown = [user("What is the capital of France?"), {"role": "assistant", "content": result.text}]
    assert second.prompt_token_ids == demo.encode([*shown, user("And of Japan?")]).tolist()


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["tific", "ationύ", "d id", "бо", "designed", "ύут"])
def test_a_stop_string_may_begin_inside_a_token(tiny: Pipeline, stop: str, include: bool) -> None:
    """The reply is `designed identificationύутбоcurl...`; only the token that holds the cut is encoded again."""
    chat = tiny.chat()
    result = chat.send("What is the capital of France?", stop=stop, include_stop=include, max_new_tokens=12)
    kept = chat.token_ids[len(result.prompt_token_ids) :].tolist()
    assert result.stop_string == stop
    assert tiny.tokenizer.decode(kept, after=result.prompt_token_ids) == result.text == chat.messages[-1]["content"]
    common = next((i for i, (a, b) in enumerate(zip(kept, result.token_ids, strict=False)) if a != b), len(kept))
    assert len(tiny.tokenizer.decode(result.token_ids[: common + 1])) >= len(result.text)
    assert chat.send("Go on.", max_new_tokens=2).token_ids


def test_a_reply_that_its_first_token_stops_is_an_empty_turn(tiny: Pipeline) -> None:
    chat = tiny.chat()
    result = chat.send("What is the capital of France?", stop="designed", max_new_tokens=12)
    assert (result.text, chat.token_ids.tolist()) == ("", result.prompt_token_ids)
    assert chat.messages[-1] == {"role": "assistant", "content": ""}
    second = chat.send("Go on.", max_new_tokens=2)
    assert second.prompt_token_ids == tiny.encode([*chat.messages[:2], user("Go on.")]).tolist()
