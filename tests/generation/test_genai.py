"""Every option reaches openvino_genai, or is refused."""

import json

import pytest
from option_examples import EXAMPLES

from ov_phi3 import ConfigError, GenerationConfig
from ov_phi3.generation.config import INFER_REQUEST_OPTIONS


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_option_reaches_genai(name: str) -> None:
    options, field, value = EXAMPLES[name]
    assert getattr(GenerationConfig(**options).to_genai(), field) == value


def test_the_other_options_reach_genai() -> None:
    import openvino_genai

    early = GenerationConfig(num_beams=2, stop_criteria="early").to_genai()
    assert early.stop_criteria == openvino_genai.StopCriteria.EARLY
    schema = GenerationConfig(json_schema={"type": "object"}).to_genai().structured_output_config
    assert json.loads(schema.json_schema) == {"type": "object"}
    assert GenerationConfig(regex="a+").to_genai().structured_output_config.regex == "a+"
    assert GenerationConfig(grammar='root ::= "a"').to_genai().structured_output_config.grammar == 'root ::= "a"'
    covered = {*EXAMPLES, "stop_criteria", "json_schema", "regex", "grammar"}
    assert covered | set(INFER_REQUEST_OPTIONS) == set(GenerationConfig.__dataclass_fields__)


def test_options_that_genai_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_logprobs=3 has no counterpart in OpenVINO GenAI; load with"):
        GenerationConfig(top_logprobs=3).to_genai()


def test_the_prompt_is_never_templated_twice() -> None:
    assert GenerationConfig().to_genai().apply_chat_template is False
