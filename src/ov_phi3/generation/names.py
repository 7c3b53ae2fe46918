"""Names of the generation options in openvino_genai, in Hugging Face's config and in OpenAI's API.

There is one table for each vocabulary. `docs/options.md` is generated from them, and a test compares them with the
installed openvino_genai, so a field that a new release adds is noticed.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ALIASES",
    "GENAI",
    "GENAI_UNSUPPORTED",
    "HF",
    "HF_IGNORED",
    "HF_NO_EFFECT",
    "OPENAI",
    "OPENAI_IGNORED",
    "OPENAI_NO_EFFECT",
    "OTHER_CALLS",
]

GENAI = {
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_length",
    "min_new_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
    "stop_strings": "stop",
    "include_stop_str_in_output": "include_stop",
    "stop_token_ids": "stop_token_ids",
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "rng_seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "num_return_sequences": "num_return_sequences",
    "num_beams": "num_beams",
    "num_beam_groups": "num_beam_groups",
    "diversity_penalty": "diversity_penalty",
    "length_penalty": "length_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "stop_criteria": "stop_criteria",
    "num_assistant_tokens": "num_assistant_tokens",
    "assistant_confidence_threshold": "assistant_confidence_threshold",
    "max_ngram_size": "max_ngram_size",
    "structured_output_config": "json_schema, regex, grammar",
}
"""Field of `openvino_genai.GenerationConfig` -> our option, or several."""

GENAI_UNSUPPORTED = {
    "eos_token_id": "A reply ends on all of the model's end tokens, not on one: see `pipe.info.eos_token_ids`.",
    "apply_chat_template": "Always off: the prompt is templated here, exactly once; `Raw` text and ids are not.",
    "echo": "A stream holds the reply only; the prompt's ids are `result.prompt_token_ids`.",
    "logprobs": "`LLMPipeline` returns no log-probabilities per token, whatever this is set to.",
    "adapters": "They are loaded, `load(adapters=...)`: the prefix cache of a request with others would be wrong.",
    "parsers": "Parsers act on the text inside GenAI's own streamer; apply them to `result.text`.",
    "return_omni_outputs": "For speech and vision models.",
    "pruning_ratio": "For vision models.",
    "relevance_weight": "For vision models.",
    "branching_factor": "For tree search with an EAGLE draft model, which no Phi-3 model has.",
    "tree_depth": "For tree search with an EAGLE draft model, which no Phi-3 model has.",
}
"""Field of `openvino_genai.GenerationConfig` without an option here -> the reason."""

HF = {
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_length",
    "min_new_tokens": "min_new_tokens",
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "bad_words_ids": "bad_words",
    "suppress_tokens": "bad_words",
    "num_beams": "num_beams",
    "num_beam_groups": "num_beam_groups",
    "diversity_penalty": "diversity_penalty",
    "length_penalty": "length_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "early_stopping": "stop_criteria",
    "num_return_sequences": "num_return_sequences",
    "stop_strings": "stop",
    "prompt_lookup_num_tokens": "num_assistant_tokens",
    "num_assistant_tokens": "num_assistant_tokens",
    "assistant_confidence_threshold": "assistant_confidence_threshold",
    "max_matching_ngram_size": "max_ngram_size",
}
"""Key of Hugging Face's `generation_config.json` -> our option."""

HF_IGNORED = (
    "_from_model_config",
    "transformers_version",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "cache_implementation",
    "cache_config",
    "return_dict_in_generate",
    "return_unused_kwargs",
    "use_cache",
    "is_assistant",
    "num_assistant_tokens_schedule",
    "assistant_lookbehind",
    "target_lookbehind",
    "disable_compile",
    "compile_config",
    "remove_invalid_values",
)
"""Keys that do not affect the reply: metadata of the file, and token ids that other files of the model hold too."""

HF_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "force_words_ids": ([],),
    "constraints": ([],),
    "renormalize_logits": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "begin_suppress_tokens": ([],),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ({},),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "min_length": (0,),
    "max_time": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "low_memory": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "prefill_chunk_size": (),
    "assistant_early_exit": (),
}
"""Key of Hugging Face's config without an option here -> values that change nothing. null changes nothing anywhere."""

OPENAI = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "seed",
    "n": "num_return_sequences",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "response_format": "json_schema",
    "logit_bias": "logit_bias",
    "top_logprobs": "top_logprobs",
}
"""Parameter of OpenAI's chat completions -> our option."""

OPENAI_IGNORED = ("model", "messages", "stream", "stream_options", "user", "store", "metadata")
"""Parameters of a chat completion that do not affect the reply."""

OPENAI_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "logprobs": (False, True),
    "tools": ([],),
    "tool_choice": ("none",),
}
"""Parameter of a chat completion without an option here -> values that change nothing."""

ALIASES = {
    **{name: ours for name, ours in {**HF, **OPENAI}.items() if name != ours},
    **{name: ours for name, ours in GENAI.items() if name != ours},
}
"""Name of an option in another vocabulary -> our name, where they differ; for error messages."""

_STREAM = "use stream() instead of generate(): `for chunk in pipe.stream(prompt): print(chunk.text)`."
OTHER_CALLS = {
    **dict.fromkeys(("streamer", "callback", "stream", "stream_options"), _STREAM),
    **dict.fromkeys(("prompts", "inputs", "messages", "input_ids"), "it is the first argument, the prompt."),
    "apply_chat_template": "a string and messages go through the chat template; Raw text and token ids do not.",
    "add_generation_prompt": "it is always added; continue_final_message=True continues the last message instead.",
    "system": "give a message with the role 'system', or use chat(system=...).",
    "logits_processor": "it is called 'logits_processors'.",
    "stopping_criteria": "give stop=, stop_token_ids= or timeout=, or leave the loop over stream().",
    "device": "load() chooses the device.",
}
"""Arguments of generation calls elsewhere that are no options here -> what to do."""
