"""Structured output on llm_pipeline: obeyed, or refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import ConfigError, Pipeline
from ov_phi3.backends.genai_structure import obeyed_schema


@pytest.fixture(scope="module", params=["tiny", "demo"])
def pipeline(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    """The vocabulary of Phi-3, with SentencePiece's marks, and a byte-level one."""
    model: Path = request.getfixturevalue({"tiny": "tiny_fp32", "demo": "demo_int4"}[request.param])
    with ov_phi3.load(model, device="CPU") as loaded:
        yield loaded


def keyed(key: str) -> dict[str, Any]:
    return {"type": "object", "properties": {key: {"type": "null"}}, "required": [key], "additionalProperties": False}


# Patterns that allow characters which JSON escapes, or whose parts are not kept together.
ESCAPED = (
    '^a"b$', r"^a\\b$", r"^a\tb$", r"^\x09$", "^.$", "^[^a]$", r"^\s$", r"^\W$", '["a]', "^ab|cd$", r"^[\t-z]$", "\t",
)  # fmt: skip
_INTEGER = {"type": "integer", "minimum": 0, "maximum": 9}
IGNORED = (
    ("'oneOf'", {"oneOf": [_INTEGER, {"type": "null"}]}),
    ("'allOf'", {"allOf": [_INTEGER, {"maximum": 3}]}),
    ("'not'", {**_INTEGER, "not": {"const": 3}}),
    ("'if'", {"if": {"const": 3}, "then": {"const": 3}}),
    ("'multipleOf'", {**_INTEGER, "multipleOf": 3}),
    ("'uniqueItems'", {"type": "array", "items": _INTEGER, "uniqueItems": True}),
    ("'contains'", {"type": "array", "items": _INTEGER, "contains": {"const": 3}}),
    ("'propertyNames'", {"type": "object", "propertyNames": {"pattern": "^a$"}}),
    ("'dependentRequired'", {"type": "object", "properties": {"a": _INTEGER}, "dependentRequired": {"a": ["b"]}}),
    ("'enum'", {"enum": [1, 5], "minimum": 3}),
    ("'const'", {"const": 1, "type": "string"}),
    ("'$ref'", {"$defs": {"x": _INTEGER}, "$ref": "#/$defs/x", "maximum": 4}),
    ("'#' in a circle", {"$ref": "#"}),
    ("in a circle", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    ("'http://x/y.json'", {"$ref": "http://x/y.json"}),
    ("characters", {"enum": ["x" * 100_000]}),
    ("'minimum'", {"type": "number", "minimum": 0.5}),
    ("'maxLength'", {"maxLength": 4}),
    ("'maxLength'", {"type": "string", "pattern": "^a*$", "maxLength": 4}),
    ("'ipv4'", {"type": "string", "format": "ipv4"}),
    ("requires 'b'", {"type": "object", "properties": {"a": _INTEGER}, "required": ["b"]}),
    ("'patternProperties'", {"properties": {"a": _INTEGER}, "patternProperties": {"^b$": _INTEGER}}),
    ("'multipleOf'", {"$defs": {"x": {"items": {"multipleOf": 3}}}, "anyOf": [{"$ref": "#/$defs/x"}]}),
    ("'^\"$'", {"type": "object", "patternProperties": {'^"$': _INTEGER}}),
)
MISREAD = (("[[:alpha:]]", "[[:alpha:]"), ("a$b", "$"), ("a^b", "^"), (r"x\0y", r"\0"), (r"\Aab\Z", r"\A"))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 2}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"regex": "hello world"}, "hello world"),
        ({"regex": " hello  world "}, " hello  world "),
        ({"regex": "a\t\n🦙é"}, "a\t\n🦙é"),
        ({"regex": "größe"}, "größe"),
        ({"regex": "<0x0A>"}, "<0x0A>"),
        ({"json_schema": {"enum": ["New York"]}}, '"New York"'),
        ({"grammar": 'root ::= "ö x ▁ y"'}, "ö x ▁ y"),
        ({"grammar": 'root ::= "<" "|end|>" "</s>"'}, "<|end|></s>"),
        ({"regex": r"<\|end\|><s>[<]unk>"}, "<|end|><s><unk>"),
        ({"json_schema": {"enum": ["<|end|>"]}}, '"<|end|>"'),
        ({"json_schema": {"const": 'a"b\\c\td'}}, '"a\\"b\\\\c\\td"'),
    ],
    ids=str,
)
def test_only_one_text_is_possible(
    pipeline: Pipeline, options: dict[str, Any], text: str, sampling: dict[str, Any]
) -> None:
    result = pipeline.generate("Say something.", max_new_tokens=40, **options, **sampling)
    assert (result.text, result.finish_reason) == (text, "stop")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_schema": {"enum": ["größe"]}}, "'ße'"),
        ({"json_schema": {"type": "object", "properties": {"é1": {"type": "integer"}}}}, "'é1'"),
        ({"json_schema": {"anyOf": [{"const": {"x": ["naïf", "ïf"]}}]}}, "'ïf'"),
        ({"grammar": 'root ::= "ß" | "üb"'}, "'üb'"),
        ({"grammar": r'root ::= "\u00dfe"'}, "'ße'"),
        *[({"json_schema": keyed(key)}, repr(key)) for key in ("a\tb", "a\nb", 'a"b', "a\\b", "a\x01")],
        *[({"json_schema": {"type": "string", "pattern": pattern}}, repr(pattern)) for pattern in ESCAPED],
        *[({"json_schema": schema}, word) for word, schema in IGNORED],
        *[({"regex": regex}, repr(atom)) for regex, atom in MISREAD],
        ({"regex": "a|b", "num_return_sequences": 3, "temperature": 1.0}, "num_return_sequences=3"),
        ({"regex": "a|b", "ignore_eos": True}, "ignore_eos=True"),
    ],
    ids=str,
)
def test_what_would_not_be_obeyed_is_refused(pipeline: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match="infer_request") as refusal:
        pipeline.generate("Say something.", max_new_tokens=4, **options)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^é1$"},
        {"type": "boolean", "title": "die Größe", "description": "déjà vu"},
        {"enum": ["schön"]},
        {"type": "boolean", "examples": ["ße"], "x-note": {"oneOf": 3}},
        {"type": "string", "pattern": r"^(a|b)[c-e]{2}\d<\|end\|>$"},
        {"type": ["integer", "null"], "minimum": 3, "maximum": 5},
        {"type": "string", "enum": ["a", "b"], "title": "one of them"},
        {"type": "object", "patternProperties": {"^a[0-9]$": {"type": "null"}}, "maxProperties": 0},
    ],
    ids=str,
)
def test_harmless_schemas_are_accepted(pipeline: Pipeline, schema: dict[str, Any]) -> None:
    result = pipeline.generate("Say something.", max_new_tokens=40, json_schema=schema)
    assert result.finish_reason == "stop"


def test_the_repaired_table_decodes_as_before(tiny_fp32: Path) -> None:
    import openvino_genai

    from ov_phi3.backends.genai_tokenizer import genai_tokenizer_arguments

    repaired = openvino_genai.Tokenizer(*genai_tokenizer_arguments(tiny_fp32, can_encode=True))
    original = openvino_genai.Tokenizer(str(tiny_fp32))
    text = "Füße, naïve  cafés:\n\t<0x0A> 🦙 ▁ end"
    ids = original.encode(text).input_ids
    assert repaired.encode(text).input_ids.data.tolist() == ids.data.tolist()
    assert repaired.decode(ids)[0] == original.decode(ids)[0]


def test_bounded_texts_have_no_control_characters(pipeline: Pipeline) -> None:
    """Each seed is one that gave such a character, or its neighbour."""
    schema = {"type": "string", "minLength": 1, "maxLength": 5}
    for seed in range(1140, 1150):
        how: dict[str, Any] = {"temperature": 3.0, "seed": seed, "max_new_tokens": 120}
        result = pipeline.generate("Say something.", json_schema=schema, **how)
        assert 1 <= len(result.parsed) <= 5


def test_only_schemas_are_changed() -> None:
    values = {"enum": [{"type": "string", "maxLength": 3}], "default": {"type": "string", "maxLength": 3}}
    long = {"type": "string", "maxLength": 1000}
    text = json.dumps({"properties": {"maxLength": values, "type": long}, "required": ["type"]})
    assert json.loads(obeyed_schema(text)) == json.loads(text)
    bounded = json.loads(obeyed_schema(json.dumps({"items": {"type": "string", "minLength": 2, "title": "x"}})))
    assert bounded == {"items": {"title": "x", "type": "string", "pattern": r'^[^"\\\x00-\x1f]{2,}$'}}
