"""Structured output on llm_pipeline: obeyed, or refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import ConfigError, Pipeline


@pytest.fixture(scope="module", params=["tiny", "demo"])
def pipeline(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    """The vocabulary of Phi-3, with SentencePiece's marks, and a byte-level one."""
    model: Path = request.getfixturevalue({"tiny": "tiny_fp32", "demo": "demo_int4"}[request.param])
    with ov_phi3.load(model, device="CPU") as loaded:
        yield loaded


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
        ({"grammar": 'root ::= "x <|end|>"'}, "'<|end|>'"),
        ({"json_schema": {"enum": ["<|end|>"]}}, "'<|end|>'"),
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
