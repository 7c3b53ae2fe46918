"""The parameters of OpenAI's chat completions."""

import json
from typing import Any

import pytest

from ov_phi3 import ConfigError, GenerationConfig


def test_names_are_mapped() -> None:
    request = {
        "model": "m",
        "messages": [],
        "stream": True,
        "max_tokens": 64,
        "temperature": 0,
        "stop": "x",
        "seed": 1,
    }
    expected = GenerationConfig(max_new_tokens=64, temperature=0, stop="x", seed=1)
    assert GenerationConfig.from_openai(request) == expected


def test_response_format() -> None:
    schema = {"type": "object", "properties": {}}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    config = GenerationConfig.from_openai({"response_format": wrapped})
    assert json.loads(str(config.json_schema)) == schema
    assert GenerationConfig.from_openai({"response_format": {"type": "text"}}) == GenerationConfig()


@pytest.mark.parametrize(
    "bad",
    [
        {"logit_bias": {"five": 1}},
        {"logit_bias": {"5": None}},
        {"top_logprobs": 3},
        {"max_token": 5},
        {"tools": [{"type": "function"}]},
        {"max_tokens": 5, "max_completion_tokens": 6},
        {"response_format": {"type": "xml"}},
    ],
)
def test_parameters_that_cannot_be_obeyed_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, TypeError)):
        GenerationConfig.from_openai(bad)
