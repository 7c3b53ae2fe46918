"""Tools in replies, streams and chats, with real models on both backends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ov_phi3 import ConfigError, Pipeline, Raw, ToolCall

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}, ADD]
ONLY_ADD: Any = {"type": "function", "function": {"name": "add"}}
USER = {"role": "user", "content": "What is the weather in Oslo?"}
SAMPLING = [{"temperature": 0}, *({"temperature": 1.0, "seed": seed} for seed in range(2))]


def check(calls: tuple[ToolCall, ...]) -> None:
    assert calls
    for call in calls:
        if call.name == "add":
            assert {key: type(value) for key, value in call.arguments.items()} == {"a": int, "b": int}
        else:
            assert call.name == "get_weather"
            assert isinstance(call.arguments["city"], str)
            assert call.arguments.get("unit") in (None, "C", "F")


def answers(calls: tuple[ToolCall, ...]) -> list[dict[str, Any]]:
    """The messages behind a reply with calls, as a program of OpenAI's client has them."""
    called = {"role": "assistant", "content": None, "tool_calls": [call.to_dict() for call in calls]}
    return [called, *({"role": "tool", "tool_call_id": call.id, "content": "5"} for call in calls)]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_two_steps(demo: Pipeline, sampling: dict[str, Any]) -> None:
    first = demo.generate([USER], tools=TOOLS, tool_choice="required", max_new_tokens=500, **sampling)
    assert (first.text, first.finish_reason) == ("", "tool_calls")
    check(first.tool_calls)
    messages = [USER, *answers(first.tool_calls)]
    stream = demo.stream(messages, tools=TOOLS, tool_choice=ONLY_ADD, max_new_tokens=500, **sampling)
    chunks = list(stream)
    (call,) = stream.result.tool_calls
    assert call.name == "add"
    check((call,))
    assert "".join(chunk.text for chunk in chunks) == stream.result.text == ""
    assert [c for chunk in chunks for c in chunk.tool_calls] == [call]
    assert (chunks[-1].finish_reason, stream.result.finish_reason) == ("tool_calls", "tool_calls")
    answer = demo.generate(messages + answers((call,)), tools=TOOLS, tool_choice="none", max_new_tokens=8)
    assert (answer.tool_calls, bool(answer.text)) == ((), True)


def test_chats(demo: Pipeline, tmp_path: Path) -> None:
    how: dict[str, Any] = {"temperature": 1.0, "seed": 1, "max_new_tokens": 500}
    chat = demo.chat(system="Be brief.", tools=TOOLS)
    result = chat.send(USER["content"], tool_choice="required", **how)
    check(result.tool_calls)
    tool_calls = [{**call.to_dict(), "function": {"name": call.name, "arguments": call.arguments}}
                  for call in result.tool_calls]  # fmt: skip
    called = {"role": "assistant", "content": "", "tool_calls": tool_calls}
    assert chat.messages == [{"role": "system", "content": "Be brief."}, USER, called]
    assert result.prompt_token_ids == demo.encode(chat.messages[:2], tools=TOOLS).tolist()
    results = answers(result.tool_calls)[1:]
    chat.save(tmp_path / "chat.kv")
    for other in (chat.fork(), demo.load_chat(tmp_path / "chat.kv")):
        assert other.messages == chat.messages
        stream = other.stream(results, tool_choice=ONLY_ADD, **how)
        assert [c.name for chunk in stream for c in chunk.tool_calls] == ["add"]
        names = [message["name"] for message in other.messages if message["role"] == "tool"]
        assert names == [call.name for call in result.tool_calls]
        last = other.send(answers(stream.result.tool_calls)[1:], max_new_tokens=8)
        assert (last.tool_calls, bool(last.text)) == ((), True)


def test_a_chat_continues_calls_from_elsewhere(tiny: Pipeline) -> None:
    call = ToolCall("add", {"a": 1, "b": 2})
    history = [USER, *answers((call,))]
    chat = tiny.chat(messages=history, tools=TOOLS)
    result = chat.send([], tool_choice="none", max_new_tokens=2)
    assert result.prompt_token_ids == tiny.encode(history, tools=TOOLS).tolist()
    assert tiny.count_tokens(history, tools=TOOLS) == len(result.prompt_token_ids)
    text = tiny.tokenizer.decode(result.prompt_token_ids)
    assert '[{"name": "add", "arguments": {"a": 1, "b": 2}}]' in text
    assert "Result of add:\n5" in text
    assert chat.messages[2]["tool_call_id"] == call.id


@pytest.mark.parametrize("choice", ["required", ONLY_ADD])
def test_the_real_vocabulary_and_random_weights(tiny: Pipeline, choice: Any) -> None:
    for seed in range(3):
        result = tiny.generate("Hi", tools=TOOLS, tool_choice=choice, temperature=1.0, seed=seed, max_new_tokens=800)
        check(result.tool_calls)


def test_async_streams(demo: Pipeline) -> None:
    async def read() -> list[ToolCall]:
        stream = demo.stream("Add 1 and 2.", tools=[ADD], tool_choice="required", max_new_tokens=200)
        return [call async for chunk in stream for call in chunk.tool_calls]

    check(tuple(asyncio.run(read())))


def test_a_reply_that_need_not_call(demo: Pipeline) -> None:
    for choice in (None, "auto", "none"):
        result = demo.generate([USER], tools=TOOLS, tool_choice=choice, max_new_tokens=8)
        assert (result.tool_calls, bool(result.text), result.config.json_schema) == ((), True, None)
    no_tools = demo.generate([USER], max_new_tokens=8)
    assert no_tools.prompt_token_ids == demo.encode([USER]).tolist()
    assert demo.generate([USER], tools=[], tool_choice="auto", max_new_tokens=8).text == no_tools.text


def test_a_cut_call_is_text(demo: Pipeline) -> None:
    result = demo.generate([USER], tools=TOOLS, tool_choice="required", max_new_tokens=8)
    assert (result.tool_calls, result.finish_reason) == ((), "length")
    assert result.text.startswith("[")
    assert result.to_dict()["tool_calls"] == []


def test_samples_call_too(loop: Pipeline) -> None:
    how: Any = {"temperature": 1.0, "seed": 1, "num_return_sequences": 3, "max_new_tokens": 100}
    result = loop.generate([USER], tools=TOOLS, tool_choice=ONLY_ADD, **how)
    assert len(result.alternatives) == 3
    for reply in (result, *result.alternatives):
        check(reply.tool_calls)
        assert (reply.text, reply.finish_reason) == ("", "tool_calls")
    json.dumps(result.to_dict())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("Hi", {"json_schema": {"type": "object"}}, "tools contradicts json_schema"),
        ("Hi", {"regex": "a", "tool_choice": "required"}, "tools contradicts regex"),
        (
            "Hi",
            {"tool_choice": "required", "num_beams": 2},
            "tool_choice, which is enforced by a JSON schema.*num_beams",
        ),
        ("Hi", {"tool_choice": "must"}, "tool_choice='must'"),
        (Raw("Hi"), {}, "tools needs a prompt"),
        ([1, 2], {}, "tools needs a prompt"),
    ],
)
def test_refused(tiny: Pipeline, prompt: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.generate(prompt, tools=TOOLS, **options)


def test_what_llm_pipeline_cannot_enforce_names_the_other_backend(tiny_pipe: Pipeline) -> None:
    with pytest.raises(ConfigError, match="tool_choice is enforced by a JSON schema.*backend='infer_request'"):
        tiny_pipe.generate("Hi", tools=TOOLS, tool_choice="required", ignore_eos=True)


def test_a_chat_without_tools_has_no_choice(tiny_pipe: Pipeline) -> None:
    with pytest.raises(ConfigError, match="needs tools"):
        tiny_pipe.chat().send("Hi", tool_choice="required")


def test_tools_none_leaves_other_structures(demo: Pipeline) -> None:
    result = demo.generate([USER], tools=TOOLS, tool_choice="none", regex="[a-z]{3}", max_new_tokens=8)
    assert (len(result.text), result.tool_calls) == (3, ())
