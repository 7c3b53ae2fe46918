"""Structured output that GenAI's XGrammar would get wrong without an error (openvino-genai 2026.4.1)."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ov_phi3.generation.config import GenerationConfig

__all__ = ["unsupported_structure"]

# XGrammar writes these letters as "\xE4" and reads a hexadecimal digit behind them as part of the number.
_MISREAD = re.compile("[\u0080-\u00ff][0-9a-fA-F]")
# A literal that names a control token is obeyed with that token, which is no text.
_CONTROL = re.compile(r"<\|\w+\|>|</?s>|<unk>")
_NOT_LITERAL = frozenset({"pattern", "title", "description", "$comment", "examples", "default"})


def unsupported_structure(config: GenerationConfig) -> str | None:
    """Why a structure would not be obeyed, and what to do; None if it would be."""
    kind = config.structure
    if kind is None:
        return None
    problem = _problem(config, kind)
    return problem and f"{problem} Load with backend='infer_request' for it."


def _problem(config: GenerationConfig, kind: str) -> str | None:
    if config.num_sequences > 1:
        return (
            f"{kind} with num_return_sequences={config.num_return_sequences}: backend='llm_pipeline' would apply it to "
            "the first reply only."
        )
    if config.ignore_eos:
        return f"{kind} with ignore_eos=True: backend='llm_pipeline' would go on without it behind its end."
    text = getattr(config, kind)
    literals = _literals(json.loads(text)) if kind == "json_schema" else iter((text,) if kind == "grammar" else ())
    for literal in literals:
        if found := _CONTROL.search(literal):
            return f"{kind} contains {found[0]!r}: backend='llm_pipeline' would take a control token for it."
        if found := _MISREAD.search(literal):
            return (
                f"{kind} contains {found[0]!r} (in {literal[:60]!r}): backend='llm_pipeline' would read the letter and "
                "the digit behind it as another character."
            )
    return None


def _literals(schema: Any) -> Iterator[str]:
    """The texts of a schema that a reply repeats: keys, and values of enum and const."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, list):
        for item in schema:
            yield from _literals(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            if key not in _NOT_LITERAL or not isinstance(value, str):
                yield from _literals(value)
