"""Structured output on our own engine: what was asked for holds, with the real Phi-3 vocabulary and the demo's."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest

from ov_phi3 import ConfigError, GenerationError, Pipeline

PROMPT = "Say something."
EXACT: list[tuple[dict[str, Any], str]] = [
    ({"regex": "hello world"}, "hello world"),
    ({"regex": "hello world", "temperature": 1.0, "seed": 2}, "hello world"),
    ({"regex": "<0x0A>"}, "<0x0A>"),
    ({"regex": "a\nb\tc"}, "a\nb\tc"),
    ({"regex": "ße 1a"}, "ße 1a"),
    ({"json_schema": {"enum": ["New York"]}}, '"New York"'),
    ({"json_schema": {"enum": ["größe"]}}, '"größe"'),
    ({"json_schema": {"const": {"größe": 1}}}, '{"größe":1}'),
    ({"grammar": 'root ::= "the " "größe" "!"'}, "the größe!"),
    ({"json_schema": {"const": ["\u2581mark", " x"]}}, '["\u2581mark"," x"]'),
    ({"grammar": r'root ::= "\u0041" "00b" [\u00df] "\xdfe" "\U0001F999"'}, "A00bßße🦙"),
    ({"grammar": r'root ::= "\\u0041\u0022\u000a"'}, '\\u0041"\n'),
    ({"grammar": 'start: "größe" /<s>/ "<|end|>"'}, "größe<s><|end|>"),
]


@pytest.fixture(params=["tiny_loop", "loop"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    """The engine with the real Phi-3 vocabulary, and with the demo model's."""
    loaded: Pipeline = request.getfixturevalue(request.param)
    return loaded


@pytest.mark.parametrize(("options", "text"), EXACT)
def test_only_one_text_is_possible(pipe: Pipeline, options: dict[str, Any], text: str) -> None:
    result = pipe.generate(PROMPT, max_new_tokens=60, **options)
    assert (result.text, result.finish_reason) == (text, "stop")


def test_values_of_a_schema(pipe: Pipeline) -> None:
    """Keys and constants with accents, white space and emoji come out as JSON of the schema, compact."""
    schema = {
        "type": "object",
        "properties": {"größe": {"const": "a\n\t🦙 b"}, "n": {"enum": [1, 2]}},
        "required": ["größe", "n"],
        "additionalProperties": False,
    }
    text = pipe.generate(PROMPT, json_schema=schema, max_new_tokens=80).text
    value = json.loads(text)
    assert value["größe"] == "a\n\t🦙 b"
    assert value["n"] in (1, 2)
    assert ": " not in text


@pytest.mark.parametrize("pattern", [r"a(b|c) [0-9]{3}", r"[äöü]{2,4}x", r"(yes|no)( ,\.){0,3}", r"🦙?[a-f]{5}"])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_regular_expressions_match(pipe: Pipeline, pattern: str, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 7} if temperature else {"do_sample": False}
    result = pipe.generate(PROMPT, regex=pattern, max_new_tokens=60, **options)
    assert result.finish_reason == "stop"
    assert re.fullmatch(pattern, result.text)


def test_every_sample_obeys(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"num_return_sequences": 3, "temperature": 1.5, "seed": 1, "max_new_tokens": 40}
    result = pipe.generate(PROMPT, regex="a(b|c) [0-9]{3}", **options)
    assert len(result.alternatives) == 3
    assert all(re.fullmatch("a(b|c) [0-9]{3}", reply.text) for reply in result.alternatives)


def test_a_complete_structure_ends_the_reply(pipe: Pipeline) -> None:
    """Also if the model's end tokens are to be ignored."""
    result = pipe.generate(PROMPT, regex="(yes|no)", ignore_eos=True, max_new_tokens=40)
    assert result.text in ("yes", "no")
    assert result.finish_reason == "stop"


def test_a_ruled_out_token_does_not_break_the_structure(pipe: Pipeline) -> None:
    """If other options leave no token that the structure allows, the structure has precedence."""
    first = pipe.tokenizer.encode_continuation("x")[0]
    result = pipe.generate(PROMPT, regex="x", logit_bias={int(first): -100.0}, max_new_tokens=10)
    assert result.text == "x"


@pytest.mark.parametrize("bad", [{"regex": "((("}, {"json_schema": {"type": "nosuch"}}, {"grammar": "root ::= nosuch"}])
def test_what_does_not_compile_is_refused(tiny_loop: Pipeline, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} was not accepted: "):
        tiny_loop.generate(PROMPT, max_new_tokens=5, **bad)
    assert tiny_loop.generate(PROMPT, max_new_tokens=1).token_ids


def test_a_grammar_that_explodes_ends_with_an_error(tiny_loop: Pipeline) -> None:
    """A hostile pattern is refused or ends, and the pipeline is usable afterwards."""
    with contextlib.suppress(ConfigError, GenerationError):
        tiny_loop.generate(PROMPT, regex="(a|a)*" * 200 + "b{1000}{1000}", max_new_tokens=3)
    assert tiny_loop.generate(PROMPT, max_new_tokens=1).token_ids


def test_the_package_is_named_where_it_is_missing(tiny_loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=r"needs the package llguidance .*: pip install"):
        tiny_loop.generate(PROMPT, regex="never compiled before", max_new_tokens=5)
