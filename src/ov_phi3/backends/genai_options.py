"""Options that `openvino_genai.LLMPipeline` lacks, or would refuse while it runs (openvino-genai 2026.4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.generation.config import GenerationConfig

__all__ = ["ASSISTED_OPTIONS", "unsupported_options"]

ASSISTED_OPTIONS = ("num_assistant_tokens", "assistant_confidence_threshold", "max_ngram_size")
"""Options of prompt lookup and draft models."""

_MAX_SEED = 2**32 - 1  # GenAI's generator of random numbers has a state of 32 bits


def unsupported_options(config: GenerationConfig, assisted: str) -> str | None:
    """The first option that the pipeline does not support, as a sentence; None if it supports all.

    Args:
        config: fully resolved.
        assisted: "prompt_lookup" or "draft_model", if the pipeline was loaded with it; otherwise "".
    """
    if options := config.infer_request_options:
        return f"{options[0]} needs a pipeline loaded with backend='infer_request'."
    if (config.seed or 0) > _MAX_SEED:
        return (
            f"seed={config.seed} is above {_MAX_SEED}, the largest seed of backend='llm_pipeline'; give a smaller "
            "one, or load with backend='infer_request'."
        )
    if config.is_multi_sequence and config.stop:
        # GenAI's own stop strings fail inside beam search, and drop ids from samples.
        return (
            f"{config.show('stop')} with {_several(config)}: backend='llm_pipeline' would compute every reply past its "
            "stop string to the end; load with backend='infer_request', or give stop_token_ids."
        )
    return _unsupported_assistance(config, assisted)


def _unsupported_assistance(config: GenerationConfig, assisted: str) -> str | None:
    """Options of speculative decoding that the pipeline was not loaded for, or that it cannot combine."""
    given = [name for name in ASSISTED_OPTIONS if getattr(config, name) is not None]
    if not assisted:
        how = "a pipeline loaded with ov_config={'prompt_lookup': True} or load(draft_model=...)"
        return f"{given[0]} needs {how}." if given else None
    loaded = "the draft model" if assisted == "draft_model" else f"the {assisted} of ov_config"
    if config.is_multi_sequence:
        other = config.show(given[0]) if given else loaded
        return f"{_several(config)} contradicts {other}: speculative decoding is for one reply at a time."
    if assisted == "draft_model":
        return f"max_ngram_size contradicts {loaded}: it is for prompt lookup." if "max_ngram_size" in given else None
    if "assistant_confidence_threshold" in given:
        return f"assistant_confidence_threshold contradicts {loaded}: it is for draft models."
    if given == ["num_assistant_tokens"]:
        return "num_assistant_tokens needs max_ngram_size too: prompt lookup searches for n-grams up to that size."
    return None


def _several(config: GenerationConfig) -> str:
    """The option that asks for several sequences, as "name=value"."""
    return config.show("num_beams" if (config.num_beams or 1) > 1 else "num_return_sequences")
