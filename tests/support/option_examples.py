"""A valid config for each option with a plain counterpart in openvino_genai, with a value other than its default."""

from typing import Any

EXAMPLES: dict[str, tuple[dict[str, Any], str, Any]] = {
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
"""Option -> valid options that include it, the field of `openvino_genai.GenerationConfig`, its expected value."""
