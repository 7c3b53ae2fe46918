"""Calls that a reply makes by itself, with what the model wrote set by a script."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import MakePipe, steps_of

from ov_phi3 import Tokenizer

ADD = {"name": "add", "parameters": {"type": "object", "properties": {}}}
CALL = '[{"name": "add", "arguments": {"a": "größe 🦙"}}]'


@pytest.mark.parametrize(
    "written", [CALL, f"functools{CALL}", f"<|tool_call|>{CALL}<|/tool_call|>", f"Well, functools{CALL}", f" {CALL}\n"]
)
def test_a_call_is_reported_when_it_is_complete(make: MakePipe, tokenizer: Tokenizer, written: str) -> None:
    steps = [*steps_of(tokenizer, written), [tokenizer.control_tokens["<|end|>"]]]
    pipe, _ = make(steps)
    stream = pipe.stream("x", tools=[ADD], max_new_tokens=80)
    chunks, result = list(stream), stream.result
    (call,) = result.tool_calls
    assert (call.name, call.arguments) == ("add", {"a": "größe 🦙"})
    assert "".join(chunk.text for chunk in chunks) == result.text == ("Well, " if "Well" in written else "")
    # With the token that ends it, not with the end of the reply.
    reported = next(index for index, chunk in enumerate(chunks) if chunk.tool_calls)
    assert tokenizer.decode([i for c in chunks[: reported + 1] for i in c.token_ids]).count("]") == 1
    assert [c.tool_calls for c in chunks if c.tool_calls] == [(call,)]
    assert (chunks[-1].finish_reason, result.finish_reason) == ("tool_calls", "tool_calls")
    assert result.metrics.generated_tokens == len(result.token_ids) == sum(map(len, steps))


@pytest.mark.parametrize("options", [{"tools": [ADD], "tool_choice": "none"}, {}, {"tools": [{**ADD, "name": "sub"}]}])
def test_what_is_no_call_is_shown(make: MakePipe, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    pipe, _ = make([*steps_of(tokenizer, CALL), [tokenizer.control_tokens["<|end|>"]]])
    stream = pipe.stream("x", max_new_tokens=80, **options)
    assert "".join(chunk.text for chunk in stream) == stream.result.text == CALL
    assert (stream.result.tool_calls, stream.result.finish_reason) == ((), "stop")


def test_a_reply_that_is_cut_in_a_call(make: MakePipe, tokenizer: Tokenizer) -> None:
    pipe, _ = make(steps_of(tokenizer, CALL))
    stream = pipe.stream("x", tools=[ADD], max_new_tokens=8)
    shown = "".join(chunk.text for chunk in stream)
    assert shown == stream.result.text == tokenizer.decode(stream.result.token_ids)
    assert (stream.result.tool_calls, stream.result.finish_reason) == ((), "length")
    stopped = pipe.generate("x", tools=[ADD], stop=["arguments"], max_new_tokens=80)
    assert (stopped.text, stopped.tool_calls, stopped.finish_reason) == ('[{"name": "add", "', (), "stop")


def test_a_stop_string_behind_a_call(make: MakePipe, tokenizer: Tokenizer) -> None:
    pipe, _ = make(steps_of(tokenizer, f"functools{CALL} and then"))
    chat = pipe.chat(tools=[ADD])
    result = chat.send("x", stop=["then"], max_new_tokens=80)
    assert (result.text, len(result.tool_calls), result.finish_reason) == ("and ", 1, "tool_calls")
    assert chat.token_ids.tolist() == result.prompt_token_ids + result.token_ids
    assert chat.messages[-1]["tool_calls"][0]["id"] == result.tool_calls[0].id
