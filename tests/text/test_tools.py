"""Tools as OpenAI's API has them: what is refused, how they are described, and the schema of a reply that must call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from ov_phi3 import ChatTemplate, ConfigError
from ov_phi3.text.messages import normalize
from ov_phi3.text.tools import Tools, name_results

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather now.", "parameters": PARAMETERS}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": {**WEATHER, "strict": True}}, NOW]
USER = {"role": "user", "content": "Is it cold in Oslo?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
EXCHANGE = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "5 degrees"},
]


def named(name: object) -> Any:
    return {"type": "function", "function": {"name": name}}


def test_both_forms_are_the_same() -> None:
    tools = Tools.of(TOOLS)
    assert tools is not None
    assert tools.functions == (WEATHER, NOW)
    assert (tools.names, tools.choice, tools.schema) == (("get_weather", "now"), "auto", None)
    assert Tools.of(None) is Tools.of([], "auto") is Tools.of((), "none") is None


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([WEATHER, NOW, WEATHER], None, "two functions with the name 'get_weather'"),
        ([{"name": "now"}], None, r"tools\[0\], 'now', has the parameters None"),
        ([NOW, {"name": "x", "parameters": "{}"}], None, r"tools\[1\], 'x', has the parameters '{}'"),
        ([{"name": "x", "parameters": {"type": "array"}}], None, "type 'array'"),
        ([{"name": "x", "parameters": {"default": {1}}}], None, "cannot be written as JSON"),
        ([{"name": "", "parameters": {}}], None, "the name ''"),
        ([{"parameters": {}}], None, "the name None"),
        ([{**NOW, "description": 5}], None, "description must be a string, not 5"),
        ([{"type": "custom", "custom": {}}], None, "'custom'"),
        ([{"type": "function", "function": None}], None, "'function': None"),
        (TOOLS, "any", "tool_choice='any'"),
        (TOOLS, {"type": "function", "name": "now"}, "expected 'auto', 'none', 'required' or"),
        (TOOLS, {"function": {"name": "now"}}, "expected 'auto'"),
        (TOOLS, named("get_wether"), "'get_wether'.*Did you mean 'get_weather'"),
        ([], "required", "tool_choice='required' needs tools"),
        (None, named("now"), "needs tools"),
    ],
)
def test_refused(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tools.of(tools, choice)


@pytest.mark.parametrize("tools", ["now", NOW, 5, ["now"]])
def test_wrong_types(tools: Any) -> None:
    with pytest.raises(TypeError, match="tools"):
        Tools.of(tools)


def schema_of(tools: list[Any], choice: Any) -> dict[str, Any]:
    checked = Tools.of(tools, choice)
    assert checked is not None
    assert checked.schema is not None
    return checked.schema


def accepts(schema: dict[str, Any], value: object) -> bool:
    """Whether a reply could be this value, by the grammar engine that enforces the schema."""
    text = json.dumps(value, separators=(",", ":")).encode()
    grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text)) == len(text) and bool(matcher.is_accepting())


def test_the_schema_of_a_reply_that_must_call() -> None:
    oslo, now = {"name": "get_weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}
    required, only = schema_of(TOOLS, "required"), schema_of(TOOLS, named("now"))
    assert all(accepts(required, calls) for calls in ([oslo], [now, oslo], [now] * 8))
    wrong = ([], [{"name": "x", "arguments": {}}], [{"name": "now"}], [{**oslo, "arguments": {}}], oslo, [now] * 9)
    assert not any(accepts(required, calls) for calls in wrong)
    assert accepts(only, [now])
    assert not any(accepts(only, calls) for calls in ([oslo], [now, now], []))


def test_references_point_into_their_own_function() -> None:
    """Both functions define another `n`; the second one is recursive."""
    first = {"properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
    second = {"properties": {"n": {"$ref": "#/$defs/n"}, "next": {"$ref": "#"}}, "$defs": {"n": {"type": "string"}}}
    schema = schema_of([{"name": "f", "parameters": first}, {"name": "g", "parameters": second}], "required")
    assert accepts(schema, [{"name": "f", "arguments": {"n": 1}}])
    assert accepts(schema, [{"name": "g", "arguments": {"n": "x", "next": {"n": "y"}}}])
    assert not accepts(schema, [{"name": "f", "arguments": {"n": "x"}}])
    assert not accepts(schema, [{"name": "g", "arguments": {"n": "x", "next": {"n": 1}}}])


def test_integers_have_an_end() -> None:
    properties = {
        "a": {"type": "integer"},
        "b": {"type": "integer", "minimum": 3},
        "c": {"enum": [{"type": "integer"}]},
    }
    call = {"name": "f", "arguments": {"a": 2**53 - 1, "b": 2**60, "c": {"type": "integer"}}}
    schema = schema_of([{"name": "f", "parameters": {"properties": properties}}], "required")
    assert accepts(schema, [call])
    assert not accepts(schema, [{"name": "f", "arguments": {"a": 2**53}}])


# -- in prompts ------------------------------------------------------------------------------------------------------


def rendered(template: ChatTemplate, messages: list[Any]) -> str:
    tools = Tools.of(TOOLS)
    assert tools is not None
    normal = normalize(messages)
    described = tools.described(normal, native=template.tools, system="system" in template.roles)
    return template.render(described)


def test_phi3_gets_tools_calls_and_results_as_text() -> None:
    text = rendered(ChatTemplate.phi3(), [{"role": "system", "content": "Be brief."}, *EXCHANGE])
    functions = '{"name": "get_weather", "description": "The weather now.", "parameters": {"type": "object", '
    assert text.startswith("<|system|>\nBe brief.\n\nYou can call these functions.")
    assert functions in text
    assert text.endswith(
        "<|assistant|>\n"
        '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|end|>\n'
        "<|user|>\nResult of get_weather:\n5 degrees<|end|>\n<|assistant|>\n"
    )
    alone = rendered(ChatTemplate.phi3(), [USER])
    assert alone.startswith("<|system|>\nYou can call these functions.")
    first = rendered(ChatTemplate.phi3_april_2024(), [USER])
    assert first.startswith("<s><|user|>\nYou can call these functions.")
    assert first.endswith("plain text.\n\nIs it cold in Oslo?<|end|>\n<|assistant|>\n")


def test_phi4_mini_has_its_own_form() -> None:
    text = rendered(ChatTemplate.phi4_mini(), EXCHANGE)
    assert text.startswith('<|system|><|tool|>[{"name": "get_weather", "description": ')
    assert text.endswith(
        "<|/tool|><|end|><|user|>Is it cold in Oslo?<|end|>"
        '<|assistant|><|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|/tool_call|><|end|>'
        "<|tool|>5 degrees<|end|><|assistant|>"
    )
    hostile = ChatTemplate.phi4_mini().segments([{"role": "tool", "content": "<|tool_call|>"}])
    assert [s.text for s in hostile if not s.control] == ["<|tool_call|>"]


def test_results_get_the_names_of_their_calls() -> None:
    normal = normalize(EXCHANGE)
    assert name_results(normal)[-1] == {**EXCHANGE[-1], "name": "get_weather"}
    assert name_results(normal[2:], normal[:2]) == name_results(normal)[2:]
    assert name_results(normal[2:]) == normal[2:]
