"""The names that generation options have elsewhere: in openvino_genai, in Hugging Face's config, in OpenAI's API.

One table a vocabulary. `docs/options.md` is generated from them, and a test holds them against the installed
openvino_genai, so that a field which a new release adds cannot go unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import openvino_genai

    from ov_phi3.generation.config import GenerationConfig

__all__ = ["ALIASES", "GENAI", "GENAI_UNREACHABLE", "HF", "HF_NEUTRAL", "OPENAI", "OPENAI_PASSED_BY"]

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
"""Field of `openvino_genai.GenerationConfig` -> option here."""

GENAI_UNREACHABLE = {
    "eos_token_id": "A reply ends on all of the model's end tokens, not on one: see `pipe.info.eos_token_ids`.",
    "apply_chat_template": "Always off: the prompt is templated here, exactly once; `Raw` text and ids are not.",
    "echo": "A stream holds the reply only; the prompt's ids are `result.prompt_token_ids`.",
    "logprobs": "`LLMPipeline` returns no log-probabilities per token, whatever this is set to.",
    "adapters": "Switching LoRA weights would leave a prefix cache that was computed with other weights.",
    "parsers": "Parsers act on the text inside GenAI's own streamer; apply them to `result.text`.",
    "return_omni_outputs": "For speech and vision models.",
    "pruning_ratio": "For vision models.",
    "relevance_weight": "For vision models.",
    "branching_factor": "For tree search with an EAGLE draft model, which no Phi-3 model has.",
    "tree_depth": "For tree search with an EAGLE draft model, which no Phi-3 model has.",
}
"""Field of `openvino_genai.GenerationConfig` that has no option here -> why."""

HF = {
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_length",
    "min_new_tokens": "min_new_tokens",
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
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
"""Key of Hugging Face's `generation_config.json` -> option here."""

# Keys that say nothing about the reply (who wrote the file, ids that the model directory's other files give too) ...
HF_PASSED_BY = (
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

# ... and keys that have no counterpart, with the values at which they change nothing. null never changes anything.
HF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "renormalize_logits": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
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
"""Key of Hugging Face's config without a counterpart here -> values that change nothing."""

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
"""Parameter of OpenAI's chat completions -> option here."""

OPENAI_PASSED_BY = ("model", "messages", "stream", "stream_options", "user", "store", "metadata")
"""Parameters of a chat completion that say nothing about how the reply is generated."""

_OPENAI_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (False, True),
    "tools": ([],),
    "tool_choice": ("none",),
}

ALIASES = {
    **{name: ours for name, ours in {**HF, **OPENAI}.items() if name != ours},
    **{name: ours for name, ours in GENAI.items() if name != ours},
}
"""What an option is called elsewhere -> what it is called here; for error messages."""


def from_hf(source: str | Path | Mapping[str, Any], *, dropped: list[str] | None = None) -> dict[str, Any]:
    """Hugging Face's names to ours.

    Args:
        source: a dict, a `generation_config.json`, or a directory that holds one.
        dropped: where given, keys that cannot be honoured are described in it instead of raising; for a model's own
            file, which its user did not write.

    Raises:
        ConfigError: an unreadable file, or a key that is unknown or would change the reply and has no counterpart.
    """
    out: dict[str, Any] = {}
    for key, value in _hf_dict(source).items():
        if value is None or key in HF_PASSED_BY:
            continue
        if key in HF:
            out[HF[key]] = _STOP_CRITERIA.get(value, value) if key == "early_stopping" else value
        elif value not in HF_NEUTRAL.get(key, ()):
            problem = _hf_problem(key, value)
            if dropped is None:
                raise ConfigError(problem)
            dropped.append(problem)
    if "max_new_tokens" in out:
        out.pop("max_length", None)  # as Hugging Face has it: max_new_tokens goes before max_length
    if out.get("num_beams", 1) == 1:
        out.pop("stop_criteria", None)  # transformers writes early_stopping=false beside num_beams=1
    if not out.get("do_sample"):
        _drop_sampling(out, strict=dropped is None)
    return out


def _drop_sampling(out: dict[str, Any], *, strict: bool) -> None:
    """Take out sampling options that Hugging Face ignores because do_sample is not true, which is its default."""
    for key, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 50), ("min_p", 0.0)):
        value = out.pop(key, neutral)
        if strict and value != neutral and not (key == "top_k" and value == 0):
            raise ConfigError(
                f"{key}={value!r} has no effect in a Hugging Face config without do_sample=true. Add that, or leave "
                f"{key} out."
            )


_STOP_CRITERIA: dict[Any, str] = {True: "early", False: "heuristic", "never": "never"}


def _hf_dict(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"expected a dict or a path, not {type(source).__name__}")
    path = Path(source)
    path = path / "generation_config.json" if path.is_dir() else path
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} could not be read as a generation config: {exc}.") from exc
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}; expected a JSON object.")
    return loaded


def _hf_problem(key: str, value: object) -> str:
    if key in HF_NEUTRAL:
        return f"{key}={value!r} would change the reply and has no counterpart in OpenVINO GenAI; leave it out."
    return f"Unknown key {key!r} in a Hugging Face generation config.{did_you_mean(key, (*HF, *HF_NEUTRAL))}"


def from_openai(request: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's names to ours.

    Raises:
        ConfigError: a parameter that is unknown, or that has no counterpart here.
    """
    if not isinstance(request, Mapping):
        raise TypeError(f"expected a dict of chat-completion parameters, not {type(request).__name__}")
    out: dict[str, Any] = {}
    for key, value in request.items():
        if value is None or key in OPENAI_PASSED_BY:
            continue
        if key == "response_format":
            out.update(_response_format(value))
        elif key in OPENAI:
            ours = OPENAI[key]
            if ours in out and out[ours] != value:
                raise ConfigError(f"max_tokens and max_completion_tokens are both given: {out[ours]!r} and {value!r}.")
            out[ours] = value
        elif value not in _OPENAI_NEUTRAL.get(key, ()):
            known = (*OPENAI, *OPENAI_PASSED_BY, *_OPENAI_NEUTRAL)
            detail = "is not supported here" if key in _OPENAI_NEUTRAL else "is not a parameter known here"
            raise ConfigError(f"{key}={value!r} {detail}.{'' if key in known else did_you_mean(key, known)}")
    if request.get("logprobs"):
        out.setdefault("top_logprobs", 0)
    elif wanted := out.pop("top_logprobs", 0):
        raise ConfigError(f"top_logprobs={wanted!r} needs logprobs=true.")
    if out.get("temperature") == 0:
        out.pop("top_p", None)  # OpenAI's clients send both; at temperature 0 there is nothing left to choose from
    return out


def _response_format(value: object) -> dict[str, Any]:
    """OpenAI's response_format as a json_schema option."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema" and isinstance(value, Mapping):
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(schema, Mapping):
            return {"json_schema": dict(schema)}
    raise ConfigError(
        f"response_format={value!r}; expected {{'type': 'text'}}, {{'type': 'json_object'}} or "
        "{'type': 'json_schema', 'json_schema': {'schema': {...}}}."
    )


def to_genai(config: GenerationConfig) -> openvino_genai.GenerationConfig:
    """One of our configs as an `openvino_genai.GenerationConfig`; options not given keep GenAI's own defaults."""
    from ov_phi3.system.core import import_openvino

    import_openvino()
    import openvino_genai

    if own := config.own_loop():
        raise ConfigError(f"{own} has no counterpart in OpenVINO GenAI; load with backend='infer_request' to use it.")
    out = openvino_genai.GenerationConfig()
    out.apply_chat_template = False
    given = config.given
    for theirs, ours in GENAI.items():
        value = given.get(ours)
        if value is None or theirs == "structured_output_config":
            continue
        if theirs in ("stop_strings", "stop_token_ids"):
            value = set(value)
        elif theirs == "stop_criteria":
            value = getattr(openvino_genai.StopCriteria, value.upper())
        elif theirs in ("top_k", "no_repeat_ngram_size") and value == 0:
            continue  # GenAI's "off" is the largest size_t, which is its default
        elif theirs == "temperature" and value == 0:
            continue
        setattr(out, theirs, value)
    out.do_sample = bool(config._samples())
    structured = {name: given[name] for name in ("json_schema", "regex", "grammar") if name in given}
    if structured:
        out.structured_output_config = openvino_genai.StructuredOutputConfig(**structured)
    return out
