"""LangChain's and LiteLLM's clients, unmodified, against a real `ov-phi3 serve` process."""

from __future__ import annotations

import json
import os
from typing import Any

import pydantic
import pytest

import ov_phi3

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices when it is imported
langchain_openai = pytest.importorskip("langchain_openai")
litellm = pytest.importorskip("litellm")
from langchain_core.messages import HumanMessage, ToolMessage  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # theirs, of each other's releases

KEY = "a-key-for-the-tests"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Answer(pydantic.BaseModel):
    """An answer."""

    model_config = pydantic.ConfigDict(extra="forbid")

    city: str = pydantic.Field(max_length=12)
    sure: bool


class Add(pydantic.BaseModel):
    """Add two numbers."""

    model_config = pydantic.ConfigDict(extra="forbid")

    a: int
    b: int


def expected(loop: ov_phi3.Pipeline, **options: Any) -> str:
    return loop.generate(QUESTION, **{"max_new_tokens": 12, "temperature": 0, **options}).text


# -- LangChain ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def langchain(server: Any) -> Any:
    return langchain_openai.ChatOpenAI(
        model="phi-3",
        base_url=f"{server.url}/v1",
        api_key=KEY,
        temperature=0,
        max_tokens=12,
        max_retries=0,
        stream_usage=True,
    )


def test_langchain_chats_and_streams(langchain: Any, loop: ov_phi3.Pipeline) -> None:
    reply = langchain.invoke(QUESTION)
    assert reply.content == expected(loop)
    chunks = list(langchain.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == reply.content
    assert sum(bool(chunk.content) for chunk in chunks) > 3
    (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage["total_tokens"] == reply.usage_metadata["total_tokens"]
    assert "France" not in langchain.invoke(QUESTION, stop=["France"]).content


def test_langchain_calls_tools_in_two_turns(langchain: Any) -> None:
    for choice in ("required", "any", "Add"):
        with_tools = langchain.bind_tools([Add], tool_choice=choice)
        called = with_tools.invoke([HumanMessage("Add 1 and 2.")], max_tokens=200)
        assert called.tool_calls
        assert all((call["name"], set(call["args"])) == ("Add", {"a", "b"}) for call in called.tool_calls)
    whole = None
    for chunk in with_tools.stream([HumanMessage("Add 1 and 2.")], max_tokens=200):
        whole = chunk if whole is None else whole + chunk
    assert [call["args"] for call in whole.tool_calls] == [call["args"] for call in called.tool_calls]
    results = [ToolMessage("3", tool_call_id=call["id"]) for call in called.tool_calls]
    answer = langchain.bind_tools([Add]).invoke([HumanMessage("Add 1 and 2."), called, *results])
    assert answer.content


def test_langchain_structures_log_probabilities_and_choices(langchain: Any) -> None:
    for method in ("json_schema", "function_calling"):
        structured = langchain.with_structured_output(Answer, method=method)
        assert isinstance(structured.invoke(QUESTION, max_tokens=200), Answer)
    content = langchain.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    (three,) = langchain.generate([[HumanMessage("Hi")]], n=3, temperature=2.0, seed=3).generations
    assert len({one.text for one in three}) == 3


def test_langchain_sees_the_error(langchain: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="context window") as caught:
        langchain.invoke(QUESTION, max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"


# -- LiteLLM -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def complete(server: Any) -> Any:
    def ask(**options: Any) -> Any:
        options = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, **options}
        return litellm.completion(
            model="openai/phi-3", api_base=f"{server.url}/v1", api_key=KEY, num_retries=0, **options
        )

    return ask


def test_litellm_chats_and_streams(complete: Any, loop: ov_phi3.Pipeline) -> None:
    choice = complete().choices[0]
    assert choice.message.content == expected(loop)
    events = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == choice.message.content
    assert events[-1].usage.completion_tokens == complete().usage.completion_tokens
    stopped = complete(stop=["France"]).choices[0]
    assert (stopped.finish_reason, "France" in stopped.message.content) == ("stop", False)


def test_litellm_calls_tools_in_two_turns(complete: Any) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": Add.model_json_schema()}}]
    named = {"type": "function", "function": {"name": "add"}}
    how = {"tools": tools, "tool_choice": named, "max_tokens": 200}
    choice = complete(**how).choices[0]
    calls = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert all(set(json.loads(call.function.arguments)) == {"a", "b"} for call in calls)
    events = list(complete(stream=True, **how))
    streamed = litellm.stream_chunk_builder(events).choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in calls]
    turn = complete(messages=[*QUESTION, choice.message, *results], tools=tools, max_tokens=4)
    assert turn.choices[0].message.content


def test_litellm_structures_log_probabilities_and_choices(complete: Any) -> None:
    Answer.model_validate_json(complete(response_format=Answer, max_tokens=60).choices[0].message.content)
    content = complete(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    three = complete(n=3, temperature=2.0, seed=3).choices
    assert len({choice.message.content for choice in three}) == 3


def test_litellm_sees_the_error(complete: Any) -> None:
    with pytest.raises(litellm.ContextWindowExceededError, match="context window"):
        complete(max_tokens=10**6)
    with pytest.raises(litellm.BadRequestError, match="temprature"):
        complete(extra_body={"temprature": 1})
