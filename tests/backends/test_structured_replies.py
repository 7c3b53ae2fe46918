"""Structured replies on both backends: the value of a reply, and the check after it has ended."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ov_phi3 import ConfigError, GenerationError, Pipeline
from ov_phi3.generation.json_schema import value_of

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(params=["tiny_pipe", "tiny_loop"])
def either(request: pytest.FixtureRequest) -> Pipeline:
    loaded: Pipeline = request.getfixturevalue(request.param)
    return loaded


class Choice:
    """A class as pydantic's models are."""

    def __init__(self, n: int) -> None:
        self.n = n

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA

    @classmethod
    def model_validate(cls, value: Any) -> Choice:
        return cls(**value)


def test_the_value_of_a_reply(tiny_loop: Pipeline) -> None:
    result = tiny_loop.generate("Say something.", json_schema=SCHEMA, max_new_tokens=40)
    assert result.parsed in ({"n": 1}, {"n": 2})
    choice = tiny_loop.stream("Say something.", json_schema=Choice, max_new_tokens=40).result.parsed
    assert isinstance(choice, Choice)
    assert choice.n == result.parsed["n"]


def test_every_sample_has_its_value(tiny_loop: Pipeline) -> None:
    options: dict[str, Any] = {"num_return_sequences": 3, "temperature": 3.0, "seed": 1, "max_new_tokens": 40}
    result = tiny_loop.generate("Say something.", json_schema=SCHEMA, **options)
    assert [reply.parsed for reply in result.alternatives] == [json.loads(r.text) for r in result.alternatives]


def test_what_has_no_value(either: Pipeline) -> None:
    for options in ({}, {"regex": "[0-9]"}, {"json_schema": {"const": "x" * 60}}, {"json_schema": SCHEMA, "stop": "n"}):
        assert either.generate("Say something.", max_new_tokens=8, **options).parsed is None


def test_white_space_is_an_option(tiny_loop: Pipeline, tiny_pipe: Pipeline) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 60, "json_schema": {"const": [1, 2, 3, 4]}}
    compact = tiny_loop.generate("x", **options, seed=1)
    assert compact.text == "[1,2,3,4]"
    loose = [tiny_loop.generate("x", **options, seed=seed, json_whitespace=True).text for seed in range(6)]
    assert any(" " in text or "\n" in text for text in loose)
    with pytest.raises(ConfigError, match="json_whitespace=False.*infer_request"):
        tiny_pipe.generate("x", **options, json_whitespace=False)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("options", [{"json_schema": SCHEMA}, {"regex": "[a-c]"}, {"grammar": 'root ::= "a"'}], ids=str)
def test_a_reply_that_breaks_its_structure_is_an_error(
    either: Pipeline, options: dict[str, Any], streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated by a decoder that adds a letter: the engines obey in all cases that are known."""
    flush = "ov_phi3.text.stream_decoder.StreamDecoder.flush"
    monkeypatch.setattr(flush, lambda *_, **__: "!")
    kind = next(iter(options))
    with pytest.raises(GenerationError, match=f"the reply is not of its {kind}: it "):
        if streamed:
            list(either.stream("Say something.", max_new_tokens=40, **options))
        else:
            either.generate("Say something.", max_new_tokens=40, **options)
    monkeypatch.undo()
    assert either.generate("Say something.", max_new_tokens=40, **options).finish_reason == "stop"


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"enum": []}],
    ids=str,
)
def test_what_no_reply_satisfies_is_refused(tiny_loop: Pipeline, schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="json_schema was not accepted"):
        tiny_loop.generate("Say something.", json_schema=schema, max_new_tokens=9)


def test_a_value_that_is_not_json() -> None:
    with pytest.raises(ValueError, match="it is not JSON"):
        value_of('{"n": 1', json.dumps(SCHEMA))
