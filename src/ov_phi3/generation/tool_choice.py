"""The options of a reply that may, or must, call tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ov_phi3.errors import ConfigError

if TYPE_CHECKING:
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.text.tools import Tools

__all__ = ["constrained"]


def constrained(config: GenerationConfig, tools: Tools | None) -> GenerationConfig:
    """The options with which a reply obeys `tool_choice`: one that must call tools is held to a JSON schema.

    Raises:
        ConfigError: another structure is asked for, or an option contradicts the schema.
    """
    if tools is None or tools.choice == "none":
        return config
    if (kind := config.structure) is not None:
        raise ConfigError(
            f"tools contradicts {kind}: a reply that may call tools has no other structure. Leave one of them out, or "
            "give tool_choice='none'."
        )
    if (schema := tools.schema) is None:
        return config
    try:
        return config.replace(json_schema=schema)
    except ConfigError as exc:
        raise ConfigError(f"tool_choice, which is enforced by a JSON schema: {exc}") from exc
