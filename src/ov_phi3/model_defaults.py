"""The options of `generation_config.json`, as far as they can be applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.hf import from_hf

if TYPE_CHECKING:
    from ov_phi3.backends.protocol import Backend
    from ov_phi3.model.info import ModelInfo

__all__ = ["model_defaults", "supported_defaults"]

# Options of one request that some models' files have as well: a streamed reply would be refused, or cut off at once.
_REQUEST_OPTIONS = ("num_return_sequences", "num_beams", "num_beam_groups", "diversity_penalty", "max_length")


def model_defaults(info: ModelInfo) -> tuple[GenerationConfig, list[str]]:
    """The model's own generation options, and a warning for each that cannot be applied. None breaks a valid call."""
    ignored: list[str] = []
    file = dict(info.generation_defaults)
    for key in _REQUEST_OPTIONS:
        value = file.pop(key, None)
        neutral = (value or 0) >= info.context_length if key == "max_length" else value in (1, 0.0)
        if value is not None and not neutral:
            ignored.append(f"generation_config.json: {key}={value!r} is for single requests; give it to them.")
    options: dict[str, Any] = {}
    for name, option in from_hf(file, dropped=ignored).items():
        try:
            GenerationConfig(**options, **{name: option})
        except (ConfigError, TypeError) as exc:
            ignored.append(f"generation_config.json: {exc} It is left out.")
        else:
            options[name] = option
    return GenerationConfig(**options), ignored


def supported_defaults(defaults: GenerationConfig, backend: Backend, ignored: list[str]) -> GenerationConfig:
    """The model's own options without those that this backend lacks; `ignored` gets a warning for each of these."""
    for option in defaults.infer_request_options:
        if backend.unsupported(defaults):
            defaults = defaults.replace(**{option.partition("=")[0]: None})
            ignored.append(f"{option} of generation_config.json needs backend='infer_request' and is left out.")
    return defaults
