"""Unknown, invalid and contradictory options are refused; every other config resolves."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from option_examples import EXAMPLES

from ov_phi3 import ConfigError, GenerationConfig


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "called 'max_new_tokens'"),
        ("temprature", "Did you mean 'temperature'"),
        ("rng_seed", "called 'seed'"),
        ("stop_strings", "called 'stop'"),
        ("streamer", r"pipe\.stream"),
        ("callback", r"pipe\.stream"),
        ("messages", "first argument"),
        ("zzz", "All options"),
    ],
)
def test_unknown_options_name_the_nearest_option(name: str, hint: str) -> None:
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
        {"json_whitespace": True},
        {"regex": "a", "num_beams": 2},
        {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.5},
        {"max_ngram_size": 3},
    ],
)
def test_contradictions_are_refused(options: dict[str, Any]) -> None:
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
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
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
def test_values_of_a_wrong_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        GenerationConfig(**options)


def test_a_config_is_frozen_and_replace_makes_a_copy() -> None:
    config = GenerationConfig(temperature=0.7)
    with pytest.raises(AttributeError):
        config.temperature = 1.0  # type: ignore[misc]
    assert config.replace(temperature=0.0).temperature == 0.0
    assert config.temperature == 0.7
    assert config.replace(temperature=None) == GenerationConfig()


class TestResolve:
    """Precedence: the given options, then the model's, then the defaults."""

    def test_every_option_has_a_value(self) -> None:
        resolved = GenerationConfig().resolve(room=50)
        assert resolved.max_new_tokens == 50
        assert resolved.do_sample is False
        missing = {n for n, v in vars(resolved).items() if v is None}
        assert missing == {
            "max_length",
            "seed",
            "top_logprobs",
            "stop_on_loop",
            "json_schema",
            "json_whitespace",
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

    def test_a_seed_is_drawn_and_kept(self) -> None:
        first, second = (GenerationConfig(temperature=0.5).resolve(room=9).seed for _ in range(2))
        assert first is not None
        assert first != second
        assert GenerationConfig(temperature=0.5, seed=3).resolve(room=9).seed == 3

    def test_given_options_take_precedence_over_the_models(self) -> None:
        model = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
        assert GenerationConfig(top_p=0.5).resolve(model, room=9).top_p == 0.5
        assert GenerationConfig(top_p=0.5).resolve(model, room=9).temperature == 0.6

    def test_greedy_options_override_a_model_that_samples(self) -> None:
        model = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
        for config in (GenerationConfig(temperature=0), GenerationConfig(do_sample=False)):
            resolved = config.resolve(model, room=9)
            assert (resolved.do_sample, resolved.top_p) == (False, 1.0)

    def test_sampling_options_override_a_greedy_model(self) -> None:
        model = GenerationConfig(do_sample=False)
        assert GenerationConfig(temperature=0.5).resolve(model, room=9).do_sample is True

    def test_max_length_includes_the_prompt(self) -> None:
        assert GenerationConfig(max_length=30).resolve(room=90, prompt_tokens=10).max_new_tokens == 20

    @given(st.sampled_from(list(EXAMPLES)), st.sampled_from(list(EXAMPLES)))
    def test_any_two_configs_resolve_or_raise(self, first: str, second: str) -> None:
        config, model = GenerationConfig(**EXAMPLES[first][0]), GenerationConfig(**EXAMPLES[second][0])
        try:
            resolved = config.resolve(model, room=100, prompt_tokens=5)
        except ConfigError:
            return
        assert all(getattr(resolved, n) == v for n, v in config.given.items() if n not in ("max_length",))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_new_tokens": np.int64(2)}, {"max_new_tokens": 2}),
        ({"seed": np.uint64(2**64 - 1)}, {"seed": 2**64 - 1}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"top_p": np.float64(0.25)}, {"top_p": 0.25}),
        ({"temperature": Fraction(1, 2)}, {"temperature": 0.5}),
        ({"repetition_penalty": np.int8(2)}, {"repetition_penalty": 2}),
        ({"do_sample": np.bool_(True)}, {"do_sample": True}),
        ({"stop_token_ids": [np.int32(5), 5]}, {"stop_token_ids": (5,)}),
        ({"stop_token_ids": np.array([5, 6])}, {"stop_token_ids": (5, 6)}),
        ({"logit_bias": {np.int64(5): np.float32(1.5)}}, {"logit_bias": ((5, 1.5),)}),
        ({"logit_bias": {5: np.float32("-inf")}}, {"logit_bias": ((5, float("-inf")),)}),
    ],
)
def test_scalars_of_numpy_become_pythons(options: dict[str, Any], expected: dict[str, Any]) -> None:
    config = GenerationConfig(**options)
    assert config.given == expected
    assert all(type(value) is type(expected[name]) for name, value in config.given.items())
    biases = config.logit_bias or ()
    assert all((type(token), type(bias)) == (int, float) for token, bias in biases)
    assert all(type(token) is int for token in config.stop_token_ids or ())


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": np.bool_(True)},
        {"max_new_tokens": np.float32(2.0)},
        {"temperature": np.bool_(True)},
        {"temperature": np.array([0.5])},
        {"temperature": 0.5 + 0j},
        {"do_sample": np.int64(1)},
        {"stop_token_ids": [None]},
        {"logit_bias": {None: 1.0}},
        {"logit_bias": {5: None}},
    ],
)
def test_other_scalars_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        GenerationConfig(**options)


def test_a_huge_number_is_refused_with_a_short_message() -> None:
    with pytest.raises(ConfigError, match="an integer of 33220 bits is out of range") as caught:
        GenerationConfig(temperature=10**10_000)
    assert len(str(caught.value)) < 100
    with pytest.raises(ConfigError, match="temperature=inf"):
        GenerationConfig(temperature=Fraction(10**400))


def test_one_token_is_resolved() -> None:
    config = GenerationConfig.one_token()
    assert (config.max_new_tokens, config.do_sample, config.ignore_eos) == (1, False, True)
    assert config == config.resolve(room=5)


def test_options_of_infer_request_are_named_if_they_have_an_effect() -> None:
    assert GenerationConfig(temperature=0.5).infer_request_options == ()
    assert GenerationConfig().resolve(room=5).infer_request_options == ()
    assert GenerationConfig(logit_bias={}).infer_request_options == ()
    assert GenerationConfig(top_logprobs=0, logit_bias={3: 1}).infer_request_options == (
        "logit_bias=((3, 1.0),)",
        "top_logprobs=0",
    )


def test_multi_sequence_configs() -> None:
    assert GenerationConfig(num_beams=2).is_multi_sequence
    assert GenerationConfig(num_return_sequences=2).is_multi_sequence
    assert not GenerationConfig(num_beams=1, num_return_sequences=1).is_multi_sequence


def test_samples() -> None:
    assert GenerationConfig().samples is None
    assert GenerationConfig(top_k=0).samples is None
    assert GenerationConfig(top_k=5).samples is True
    assert GenerationConfig(temperature=0).samples is False
    assert GenerationConfig(do_sample=False).samples is False
