"""Every pair of generation options runs or is a `ConfigError` that names both; none ends in a failure of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from option_pairs import OPTIONS, contradictions, options_of, pairs, refusals

import ov_phi3
from ov_phi3 import ConfigError, GenerationConfig, Pipeline

PROMPT = [15043, 3186, 29991]


@pytest.fixture(scope="module")
def lookup(tiny_fp32: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(tiny_fp32, device=device, ov_config={"prompt_lookup": True}) as pipe:
        yield pipe


def outcome(pipe: Pipeline, first: str, second: str) -> str:
    """The message of the error, or "" for a reply."""
    try:
        result = pipe.generate(PROMPT, **options_of(first, second))
    except ConfigError as error:
        return str(error)
    assert 1 <= len(result.token_ids) <= 6, (first, second)
    return ""


@pytest.mark.parametrize(
    ("fixture", "name"),
    [("tiny_pipe", "llm_pipeline"), ("tiny_loop", "infer_request"), ("lookup", "prompt_lookup")],
)
def test_every_pair(request: pytest.FixtureRequest, fixture: str, name: str) -> None:
    pipe = request.getfixturevalue(fixture)
    wrong = []
    for first, second in pairs():
        expected = contradictions(first, second) or refusals(name, first, second)
        message = outcome(pipe, first, second)
        named = any(all(part in message for part in names) for names in expected)
        if named != bool(expected) or bool(message) != bool(expected):
            wrong.append((first, second, expected, message))
    assert wrong == [], "\n".join(map(str, wrong[:20]))
    assert pipe.generate(PROMPT, max_new_tokens=2).token_ids


def test_the_table_has_every_option() -> None:
    assert {name.partition("=")[0] for name in OPTIONS} == set(GenerationConfig.__dataclass_fields__), (
        "give a new option a value in OPTIONS, and its contradictions in the tables"
    )
    assert all(name.partition("=")[0] in options for name, options in OPTIONS.items())
