"""How results show themselves: in one line at a prompt, as Markdown in a notebook."""

from __future__ import annotations

from typing import Any

import pytest

from ov_phi3 import Alternative, GenerationConfig, GenerationResult, Metrics, Score, ToolCall

METRICS = Metrics.from_stamps(
    requested=0.0, started=0.0, tokens=[n / 10 for n in range(1, 400)], first_text=0.1, ended=40.0, prompt_tokens=13
)
LONG = "A line.\n" * 500


def result(text: str, **fields: Any) -> GenerationResult:
    values: dict[str, Any] = {"token_ids": [5] * 399, "finish_reason": "stop", "prompt_token_ids": [7] * 500}
    return GenerationResult(text=text, metrics=METRICS, config=GenerationConfig(seed=3), **{**values, **fields})


@pytest.mark.parametrize(
    "value",
    [
        result(LONG),
        result("", tool_calls=(ToolCall("get_weather", {"city": LONG}, "a"),) * 3),
        Alternative(LONG, [1] * 400, "stop", -0.5),
        METRICS,
        Score([1] * 400, [-1.0] * 400),
        GenerationConfig(max_new_tokens=5, stop=["\n"], temperature=0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_repr_is_one_short_line(value: object) -> None:
    assert "\n" not in repr(value)
    assert len(repr(value)) <= 240, repr(value)


def test_the_repr_of_a_result_begins_with_its_text() -> None:
    assert repr(result("Paris.")).startswith("<GenerationResult 'Paris.': stop after 13 prompt tokens, 399 new")
    assert "2 tool calls" in repr(result("", tool_calls=(ToolCall("f", {}, "a"),) * 2))


def test_the_repr_of_a_config_makes_the_same_config() -> None:
    config = GenerationConfig(max_new_tokens=5, stop=["\n"], temperature=0.5, logit_bias={4: -1.0})
    assert repr(config).startswith("GenerationConfig(max_new_tokens=5, ")
    assert eval(repr(config)) == config
    assert repr(GenerationConfig()) == "GenerationConfig()"


def test_a_notebook_shows_a_result_as_markdown() -> None:
    shown = result("# Title\n\n- one", tool_calls=(ToolCall("get_weather", {"city": "Oslo"}, "a"),))._repr_markdown_()
    assert shown.startswith("# Title\n\n- one")
    assert "get_weather({'city': 'Oslo'})" in shown
    assert "stop after 13 prompt tokens" in shown
