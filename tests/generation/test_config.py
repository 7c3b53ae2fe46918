"""Options: nothing unknown, nothing contradictory, nothing of GenAI's forgotten."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3 import ConfigError, GenerationConfig
from ov_phi3.generation import names as config_names
from ov_phi3.generation.config import OWN_LOOP


def test_every_field_of_genai_is_reachable_or_explained() -> None:
    import openvino_genai

    kind = openvino_genai.GenerationConfig
    fields = {n for n in dir(kind) if not n.startswith("_") and not callable(getattr(kind, n))}
    assert fields == set(config_names.GENAI) | set(config_names.GENAI_UNREACHABLE)
    assert not set(config_names.GENAI) & set(config_names.GENAI_UNREACHABLE)


def test_every_option_reaches_genai() -> None:
    ours = {name for value in config_names.GENAI.values() for name in value.split(", ")}
    assert ours | set(OWN_LOOP) == set(GenerationConfig.__dataclass_fields__)
    assert not ours & set(OWN_LOOP)


# One valid record for every option, with a value that is not GenAI's default.
REACHES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "max_new_tokens": ({"max_new_tokens": 7}, "max_new_tokens", 7),
    "max_length": ({"max_length": 70}, "max_length", 70),
    "min_new_tokens": ({"min_new_tokens": 3}, "min_new_tokens", 3),
    "ignore_eos": ({"ignore_eos": True}, "ignore_eos", True),
    "stop": ({"stop": ["a", "b"]}, "stop_strings", {"a", "b"}),
    "include_stop": ({"include_stop": True}, "include_stop_str_in_output", True),
    "stop_token_ids": ({"stop_token_ids": [5]}, "stop_token_ids", {5}),
    "do_sample": ({"do_sample": True}, "do_sample", True),
    "temperature": ({"temperature": 0.5}, "temperature", 0.5),
    "top_p": ({"top_p": 0.5}, "top_p", 0.5),
    "top_k": ({"top_k": 4}, "top_k", 4),
    "min_p": ({"min_p": 0.25}, "min_p", 0.25),
    "seed": ({"seed": 9}, "rng_seed", 9),
    "repetition_penalty": ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
    "presence_penalty": ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
    "frequency_penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
    "num_return_sequences": ({"num_return_sequences": 2, "temperature": 0.5}, "num_return_sequences", 2),
    "num_beams": ({"num_beams": 4}, "num_beams", 4),
    "num_beam_groups": ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups", 2),
    "diversity_penalty": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "diversity_penalty", 0.5),
    "length_penalty": ({"num_beams": 4, "length_penalty": 2.0}, "length_penalty", 2.0),
    "no_repeat_ngram_size": ({"num_beams": 4, "no_repeat_ngram_size": 2}, "no_repeat_ngram_size", 2),
    "num_assistant_tokens": ({"num_assistant_tokens": 4}, "num_assistant_tokens", 4),
    "assistant_confidence_threshold": ({"assistant_confidence_threshold": 0.5}, "assistant_confidence_threshold", 0.5),
    "max_ngram_size": ({"num_assistant_tokens": 4, "max_ngram_size": 3}, "max_ngram_size", 3),
}


@pytest.mark.parametrize("name", REACHES)
def test_option_reaches_genai(name: str) -> None:
    options, theirs, value = REACHES[name]
    assert getattr(GenerationConfig(**options).to_genai(), theirs) == value


def test_the_other_options_reach_genai() -> None:
    import openvino_genai

    early = GenerationConfig(num_beams=2, stop_criteria="early").to_genai()
    assert early.stop_criteria == openvino_genai.StopCriteria.EARLY
    schema = GenerationConfig(json_schema={"type": "object"}).to_genai().structured_output_config
    assert json.loads(schema.json_schema) == {"type": "object"}
    assert GenerationConfig(regex="a+").to_genai().structured_output_config.regex == "a+"
    assert GenerationConfig(grammar='root ::= "a"').to_genai().structured_output_config.grammar == 'root ::= "a"'
    covered = {*REACHES, "stop_criteria", "json_schema", "regex", "grammar"}
    assert covered | set(OWN_LOOP) == set(GenerationConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "called 'max_new_tokens'"),
        ("temprature", "Did you mean 'temperature'"),
        ("rng_seed", "called 'seed'"),
        ("stop_strings", "called 'stop'"),
        ("zzz", "All options"),
    ],
)
def test_unknown_options_name_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        GenerationConfig(**{name: 1})
    with pytest.raises(ConfigError, match=hint):
        GenerationConfig().replace(**{name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "temperature": 0.7},
        {"do_sample": False, "top_p": 0.5},
        {"temperature": 0, "top_k": 5},
        {"temperature": 0, "do_sample": True},
        {"num_beams": 2, "temperature": 0.5},
        {"num_beams": 2, "temperature": 1.0},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 3, "num_beam_groups": 2},
        {"length_penalty": 2.0},
        {"stop_criteria": "early"},
        {"num_beams": 2, "diversity_penalty": 1.0},
        {"num_beams": 2, "num_return_sequences": 3},
        {"do_sample": False, "num_return_sequences": 2},
        {"max_new_tokens": 5, "min_new_tokens": 6},
        {"max_new_tokens": 5, "max_length": 6},
        {"json_schema": {}, "regex": "a"},
        {"regex": "a", "num_beams": 2},
        {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.5},
        {"max_ngram_size": 3},
    ],
)
def test_contradictions(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GenerationConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop_token_ids": [-1]},
        {"stop_criteria": "soon"},
        {"json_schema": "not json"},
        {"json_schema": "[]"},
        {"regex": ""},
        {"regex": "x\0y"},
        {"grammar": "\ud800"},
        {"stop": "\ud800"},
        {"json_schema": {"a": "b", "c": {1, 2}}},
        {"json_schema": "[" * 100_000},
        {"max_new_tokens": 10**400},
        {"top_k": 2**70},
        {"stop_token_ids": [2**70]},
        {"length_penalty": 10**400, "num_beams": 2},
        {"temperature": 1e-50},
        {"min_p": 0.9999999999},
        {"repetition_penalty": 1e-60},
    ],
)
def test_values_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        GenerationConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": "5"},
        {"max_new_tokens": 5.0},
        {"max_new_tokens": True},
        {"temperature": "hot"},
        {"do_sample": 1},
        {"stop": 5},
        {"stop": [5]},
        {"stop_token_ids": 5},
        {"stop_token_ids": ["5"]},
        {"json_schema": 5},
        {"regex": 5},
    ],
)
def test_values_of_a_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        GenerationConfig(**options)


def test_frozen_and_replace() -> None:
    config = GenerationConfig(temperature=0.7)
    with pytest.raises(AttributeError):
        config.temperature = 1.0  # type: ignore[misc]
    assert config.replace(temperature=0.0).temperature == 0.0
    assert config.temperature == 0.7
    assert config.replace(temperature=None) == GenerationConfig()


class TestResolve:
    """What is given, what the model says, what is left."""

    def test_every_option_has_a_value(self) -> None:
        resolved = GenerationConfig().resolve(room=50)
        assert resolved.max_new_tokens == 50
        assert resolved.do_sample is False
        missing = {n for n, v in vars(resolved).items() if v is None}
        assert missing == {
            "max_length",
            "seed",
            "top_logprobs",
            "json_schema",
            "regex",
            "grammar",
            "num_assistant_tokens",
            "assistant_confidence_threshold",
            "max_ngram_size",
        }

    def test_a_sampling_option_samples(self) -> None:
        for option in ({"temperature": 0.5}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}):
            assert GenerationConfig(**option).resolve(room=9).do_sample is True
        assert GenerationConfig(temperature=0).resolve(room=9).do_sample is False

    def test_a_seed_is_drawn_and_told(self) -> None:
        first, second = (GenerationConfig(temperature=0.5).resolve(room=9).seed for _ in range(2))
        assert first is not None
        assert first != second
        assert GenerationConfig(temperature=0.5, seed=3).resolve(room=9).seed == 3

    def test_the_models_options_come_second(self) -> None:
        model = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
        assert GenerationConfig(top_p=0.5).resolve(model, room=9).top_p == 0.5
        assert GenerationConfig(top_p=0.5).resolve(model, room=9).temperature == 0.6

    def test_greedy_over_a_model_that_samples(self) -> None:
        model = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
        for config in (GenerationConfig(temperature=0), GenerationConfig(do_sample=False)):
            resolved = config.resolve(model, room=9)
            assert (resolved.do_sample, resolved.top_p) == (False, 1.0)

    def test_sampling_over_a_greedy_model(self) -> None:
        model = GenerationConfig(do_sample=False)
        assert GenerationConfig(temperature=0.5).resolve(model, room=9).do_sample is True

    def test_max_length_counts_the_prompt(self) -> None:
        assert GenerationConfig(max_length=30).resolve(room=90, prompt_tokens=10).max_new_tokens == 20

    @given(st.sampled_from(list(REACHES)), st.sampled_from(list(REACHES)))
    def test_any_two_records_resolve_or_say_why(self, one: str, other: str) -> None:
        mine, model = GenerationConfig(**REACHES[one][0]), GenerationConfig(**REACHES[other][0])
        try:
            resolved = mine.resolve(model, room=100, prompt_tokens=5)
        except ConfigError:
            return
        assert all(getattr(resolved, n) == v for n, v in mine.given.items() if n not in ("max_length",))


class TestHuggingFace:
    """generation_config.json and its names."""

    def test_phi3s_own_file(self, tmp_path: Path) -> None:
        file = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [32000, 32001, 32007]}
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({**file, "pad_token_id": 32000, "transformers_version": "4.39.3"}))
        assert GenerationConfig.from_hf(path) == GenerationConfig.from_hf(tmp_path) == GenerationConfig()

    def test_names_are_mapped(self) -> None:
        config = GenerationConfig.from_hf({"stop_strings": ["x"], "num_beams": 2, "early_stopping": True})
        assert (config.stop, config.stop_criteria) == (("x",), "early")

    def test_neutral_values_pass(self) -> None:
        full = {"typical_p": 1.0, "guidance_scale": None, "min_length": 0, "early_stopping": False, "num_beams": 1}
        assert GenerationConfig.from_hf(full) == GenerationConfig(num_beams=1)

    def test_do_sample_is_off_unless_the_file_says_so(self) -> None:
        dropped: list[str] = []
        phi4 = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
        assert config_names.from_hf(phi4, dropped=dropped) == phi4
        assert config_names.from_hf({"temperature": 0.8}, dropped=dropped) == {}
        assert GenerationConfig.from_hf({"temperature": 1.0, "top_k": 50}) == GenerationConfig()

    @pytest.mark.parametrize(
        "bad", [{"typical_p": 0.5}, {"bad_words_ids": [[1]]}, {"temprature": 1.0}, {"temperature": 0.7}]
    )
    def test_what_would_be_lost_is_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(bad))):
            GenerationConfig.from_hf(bad)

    @pytest.mark.parametrize("text", ["{", "[]", "3"])
    def test_broken_files(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "generation_config.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match="generation_config.json"):
            GenerationConfig.from_hf(path)


class TestOpenAI:
    """The names of chat completions."""

    def test_names_are_mapped(self) -> None:
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

    def test_response_format(self) -> None:
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
    def test_what_would_be_lost_is_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises((ConfigError, TypeError)):
            GenerationConfig.from_openai(bad)
