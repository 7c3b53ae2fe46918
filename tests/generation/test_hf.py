"""`generation_config.json` and Hugging Face's names."""

import json
from pathlib import Path
from typing import Any

import pytest

from ov_phi3 import ConfigError, GenerationConfig
from ov_phi3.generation.hf import from_hf


def test_the_file_of_phi3(tmp_path: Path) -> None:
    file = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [32000, 32001, 32007]}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**file, "pad_token_id": 32000, "transformers_version": "4.39.3"}))
    assert GenerationConfig.from_hf(path) == GenerationConfig.from_hf(tmp_path) == GenerationConfig()


def test_names_are_mapped() -> None:
    config = GenerationConfig.from_hf({"stop_strings": ["x"], "num_beams": 2, "early_stopping": True})
    assert (config.stop, config.stop_criteria) == (("x",), "early")


def test_values_without_effect_are_accepted() -> None:
    full = {"typical_p": 1.0, "guidance_scale": None, "min_length": 0, "early_stopping": False, "num_beams": 1}
    assert GenerationConfig.from_hf(full) == GenerationConfig(num_beams=1)


def test_sampling_options_need_do_sample() -> None:
    dropped: list[str] = []
    phi4 = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    assert from_hf(phi4, dropped=dropped) == phi4
    assert from_hf({"temperature": 0.8}, dropped=dropped) == {}
    assert GenerationConfig.from_hf({"temperature": 1.0, "top_k": 50}) == GenerationConfig()


@pytest.mark.parametrize(
    "bad", [{"typical_p": 0.5}, {"sequence_bias": {"1": 2.0}}, {"temprature": 1.0}, {"temperature": 0.7}]
)
def test_keys_that_cannot_be_obeyed_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GenerationConfig.from_hf(bad)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_broken_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="generation_config.json"):
        GenerationConfig.from_hf(path)


def test_excluded_tokens() -> None:
    config = GenerationConfig.from_hf({"bad_words_ids": [[1, 2], [3]], "suppress_tokens": [4, 5]})
    assert config.bad_words == ((1, 2), (3,), (4,), (5,))
    assert GenerationConfig.from_hf({"bad_words_ids": [], "suppress_tokens": None}).infer_request_options == ()
    with pytest.raises(TypeError, match="suppress_tokens"):
        GenerationConfig.from_hf({"suppress_tokens": 4})


def test_sampling_by_typicality() -> None:
    assert GenerationConfig.from_hf({"do_sample": True, "typical_p": 0.5}).typical_p == 0.5
