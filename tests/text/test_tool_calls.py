"""Calls in the text of replies: both marks of Phi-4-mini, the plain form, and what only looks like a call."""

from __future__ import annotations

import json
import random

import pytest

from ov_phi3.text.tool_calls import ToolCall, ToolCallParser

ADD = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
NOW = '{"name": "now", "arguments": {}}'
BRACES = '{"name": "say", "arguments": {"text": "}]\\"{ <|tool_call|> \\\\"}}'
A, N = ("add", {"a": 1, "b": [2]}), ("now", {})
B = ("say", {"text": '}]"{ <|tool_call|> \\'})
FOUND = [
    (f"[{ADD}]", "", [A]),
    (ADD, "", [A]),
    (f" \n[{ADD},\n {NOW}]\n", "", [A, N]),
    (f"{ADD}\n{NOW}", "", [A, N]),
    (("\n" + " " * 300).join(("", "[", ADD.replace(":", " " * 300 + ":"), "]")), "", [A]),
    (f"[{BRACES}]", "", [B]),
    (f"<|tool_call|>[{ADD}]<|/tool_call|>", "", [A]),
    (f"<|tool_call|>{BRACES}<|/tool_call|>", "", [B]),
    (f"<|tool_call|>[{ADD}]<|/tool_call|><|tool_call|>[{NOW}]<|/tool_call|>", "", [A, N]),
    (f"Let me see.\n<|tool_call|> [{ADD}] <|/tool_call|> Done.", "Let me see.\nDone.", [A]),
    (f"functools[{ADD}, {NOW}]", "", [A, N]),
    (f"Sure: functools[{ADD}]", "Sure: ", [A]),
    ('[{"name": "add", "parameters": {"a": 1}}]', "", [("add", {"a": 1})]),
    ('[{"name": "now"}]', "", [N]),
    ('[{"arguments": {"a": "x\ny"}, "name": "add"}]', "", [("add", {"a": "x\ny"})]),
]
TEXT = [
    "",
    " \n",
    "Oslo is cold.",
    f"The call would be {ADD}.",
    '[{"name": "unknown", "arguments": {}}]',
    f'[{ADD}, {{"name": "unknown", "arguments": {{}}}}]',
    '[{"name": "add", "arguments": "x"}]',
    '[{"name": "add", "arguments": {]}}]',
    '[{"name": "add", "arguments": {"a": 1',
    "[1, 2, 3]",
    '{"city": "Oslo"}',
    "[]",
    "<|tool_call|>[]<|/tool_call|>",
    "<|tool_call|>none",
    "<|tool_call|>",
    "functools[",
    "functools[1] is Python",
    "import functools",
    "a < b, <|tool",
    "[[[[" * 20_000,
]


def split(parser: ToolCallParser, text: str, sizes: list[int]) -> str:
    shown, start = "", 0
    for size in sizes:
        shown += parser.add(text[start : start + size])
        start += size
    return shown + parser.add(text[start:]) + parser.flush()


def parse(text: str, sizes: list[int]) -> tuple[str, list[tuple[str, dict[str, object]]]]:
    parser = ToolCallParser(["add", "now", "say"])
    shown = split(parser, text, sizes)
    return shown, [(call.name, call.arguments) for call in parser.calls]


@pytest.mark.parametrize(("text", "shown", "calls"), FOUND)
def test_calls(text: str, shown: str, calls: list[object]) -> None:
    rng = random.Random(text)
    splits = [[], [1] * len(text), *([rng.randint(1, 9) for _ in text] for _ in range(20))]
    assert all(parse(text, sizes) == (shown, calls) for sizes in splits)


@pytest.mark.parametrize("text", TEXT)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse(text, []) == (text, [])
    assert parse(text, [1] * min(len(text), 200)) == (text, [])


def test_a_call_behind_a_wrong_one() -> None:
    text = f"<|tool_call|>oops <|tool_call|>[{ADD}]"
    assert parse(text, []) == ("<|tool_call|>oops ", [A])


def test_text_is_shown_as_soon_as_it_can_be_no_call() -> None:
    parser = ToolCallParser(["add"])
    assert parser.add(" ") == ""
    assert parser.add('{"c') == ' {"c'
    assert parser.add("ity functools") == "ity "
    assert parser.add(" it") == "functools it"
    parser = ToolCallParser(["add"])
    assert [parser.add('[{"name": "add", "argum'), parser.calls] == ["", []]
    assert parser.add('ents": {}}]') == ""
    assert len(parser.calls) == 1


def test_ids_are_unique_and_openai_gets_text() -> None:
    calls = [ToolCall("say", {"text": "ä"}) for _ in range(100)]
    assert len({call.id for call in calls}) == 100
    values = calls[0].to_dict()
    assert values == {"id": calls[0].id, "type": "function", "function": values["function"]}
    assert json.loads(values["function"]["arguments"]) == {"text": "ä"}
