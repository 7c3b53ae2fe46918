"""Options to an `openvino_genai.GenerationConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ov_phi3.generation.names import GENAI
from ov_phi3.system.core import import_genai

__all__ = ["to_genai"]

_STRUCTURED_OUTPUT = "structured_output_config"


def to_genai(options: Mapping[str, Any], *, do_sample: bool) -> Any:
    """Make an `openvino_genai.GenerationConfig`. Options that are not given keep GenAI's own defaults.

    Args:
        options: checked options by our names. Options that GenAI does not have are ignored; the caller refuses them.
        do_sample: whether the reply is sampled.
    """
    openvino_genai = import_genai()
    config = openvino_genai.GenerationConfig()
    config.apply_chat_template = False
    for field, name in GENAI.items():
        value = options.get(name)
        if value is None or field == _STRUCTURED_OUTPUT:
            continue
        if field in ("stop_strings", "stop_token_ids"):
            value = set(value)
        elif field == "stop_criteria":
            value = getattr(openvino_genai.StopCriteria, value.upper())
        elif field in ("top_k", "no_repeat_ngram_size") and value == 0:
            continue  # GenAI's value for "off" is the largest size_t, which is its default
        elif field == "temperature" and value == 0:
            continue  # greedy: do_sample is False
        setattr(config, field, value)
    config.do_sample = do_sample
    structure = {name: str(options[name]) for name in GENAI[_STRUCTURED_OUTPUT].split(", ") if name in options}
    if structure:
        config.structured_output_config = openvino_genai.StructuredOutputConfig(**structure)
    return config
