"""Tools over HTTP: OpenAI's own client against a real server, and what a model writes set by a script."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from scripted import MakePipe, steps_of

import ov_phi3
from ov_phi3.serving import create_app

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
ONLY_ADD = {"type": "function", "function": {"name": "add"}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
CALL = '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'


def ask(client: Any, **options: Any) -> Any:
    options = {"messages": QUESTION, "tools": [WEATHER, ADD], "max_tokens": 300, "temperature": 0, **options}
    return client.chat.completions.create(model="phi-3", **options)


def streamed(client: Any, **options: Any) -> tuple[Any, list[Any]]:
    """The completion that the client's own helper makes of a stream, and the events."""
    options = {"messages": QUESTION, "tools": [WEATHER, ADD], "max_tokens": 300, "temperature": 0, **options}
    with client.chat.completions.stream(model="phi-3", **options) as stream:
        events = [event.chunk for event in stream if event.type == "chunk"]
        return stream.get_final_completion(), events


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


@pytest.mark.parametrize("choice", ["required", ONLY_ADD], ids=["required", "named"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_reply_that_must_call(
    openai_client: Any, loop: ov_phi3.Pipeline, choice: Any, sampling: dict[str, Any]
) -> None:
    whole = ask(openai_client, tool_choice=choice, **sampling).choices[0]
    assert (whole.message.content, whole.finish_reason) == (None, "tool_calls")
    how: Any = {"tools": [WEATHER, ADD], "tool_choice": choice, "max_new_tokens": 300, **sampling}
    expected = loop.generate(QUESTION, **how).tool_calls
    assert called(whole.message) == [(call.name, call.arguments) for call in expected]
    if choice is ONLY_ADD:
        ((name, arguments),) = called(whole.message)
        assert (name, set(arguments)) == ("add", {"a", "b"})
    completion, events = streamed(openai_client, tool_choice=choice, **sampling)
    (choice_,) = completion.choices
    assert called(choice_.message) == called(whole.message)
    assert (choice_.finish_reason, choice_.message.content or "") == ("tool_calls", "")
    calls = [call for event in events for call in event.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    assert not any(event.choices[0].delta.content for event in events)


def test_a_reply_that_need_not_call(openai_client: Any, loop: ov_phi3.Pipeline) -> None:
    for choice in ("auto", "none"):
        expected = loop.generate(QUESTION, tools=[WEATHER, ADD], tool_choice=choice, max_new_tokens=12, temperature=0)
        whole = ask(openai_client, tool_choice=choice, max_tokens=12, temperature=0).choices[0]
        assert (whole.message.content, whole.message.tool_calls) == (expected.text, None)
        events = list(ask(openai_client, tool_choice=choice, max_tokens=12, temperature=0, stream=True))
        texts = [event.choices[0].delta.content or "" for event in events]
        assert "".join(texts) == expected.text
        assert sum(map(bool, texts)) > 3  # text is streamed though there are tools


def test_the_result_of_a_call_and_the_next_turn(openai_client: Any, loop: ov_phi3.Pipeline) -> None:
    message = ask(openai_client, tool_choice="required").choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "5 degrees"} for call in message.tool_calls]
    for turn in (message, message.model_dump()):  # programs send either
        messages = [*QUESTION, turn, *results]
        reply = ask(openai_client, messages=messages, tool_choice="none", max_tokens=8)
        plain = [*QUESTION, message.model_dump(), *results]
        expected = loop.generate(plain, tools=[WEATHER, ADD], tool_choice="none", max_new_tokens=8, temperature=0)
        assert reply.choices[0].message.content == expected.text
        assert reply.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_several_choices_call_too(openai_client: Any) -> None:
    how: dict[str, Any] = {"tool_choice": ONLY_ADD, "n": 3, "temperature": 1.0, "seed": 1, "logprobs": True}
    whole = ask(openai_client, **how)
    assert len({str(called(choice.message)) for choice in whole.choices}) > 1
    completion, _ = streamed(openai_client, **how)
    for one, other in zip(whole.choices, completion.choices, strict=True):
        assert called(one.message) == called(other.message) != []
        tokens = [[entry.token for entry in choice.logprobs.content] for choice in (one, other)]
        assert tokens[0] == tokens[1] != []


def test_a_call_that_is_cut_is_text(openai_client: Any) -> None:
    whole = ask(openai_client, tool_choice="required", max_tokens=8).choices[0]
    assert (whole.message.tool_calls, whole.finish_reason) == (None, "length")
    events = list(ask(openai_client, tool_choice="required", max_tokens=8, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.message.content
    assert events[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "ad"}}}, "'ad'"),
        ({"tool_choice": "sometimes"}, "sometimes"),
        ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, "name"),
        ({"tools": [ADD, ADD]}, "'add'"),
        ({"tools": openai.omit, "tool_choice": "required"}, "needs tools"),
        ({"response_format": {"type": "json_object"}}, "tools contradicts"),
    ],
)
def test_wrong_tools_are_refused(openai_client: Any, options: dict[str, Any], word: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=word):
            ask(openai_client, stream=stream, **options)


@pytest.mark.parametrize("written", [f"Well, functools{CALL}", CALL], ids=["behind text", "alone"])
def test_a_call_that_the_model_decides_on(make: MakePipe, demo_tokenizer: ov_phi3.Tokenizer, written: str) -> None:
    pipe, _ = make([*steps_of(demo_tokenizer, written), [demo_tokenizer.control_tokens["<|end|>"]]], window=1000)

    async def both() -> tuple[Any, list[Any]]:
        transport = httpx.ASGITransport(create_app(pipe))
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http) as client,
        ):
            whole = await ask(client, tools=[WEATHER])
            return whole.choices[0], [
                event.choices[0] async for event in await ask(client, tools=[WEATHER], stream=True)
            ]

    whole, events = asyncio.run(both())
    text = "Well, " if "Well" in written else None
    assert (whole.message.content, whole.finish_reason) == (text, "tool_calls")
    assert called(whole.message) == [("get_weather", {"city": "Oslo"})]
    assert "".join(event.delta.content or "" for event in events) == (text or "")
    (call,) = [call for event in events for call in event.delta.tool_calls or []]
    assert (call.index, call.type, json.loads(call.function.arguments)) == (0, "function", {"city": "Oslo"})
    assert [event.finish_reason for event in events if event.finish_reason] == ["tool_calls"]
