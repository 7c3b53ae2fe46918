"""Random schemas and regular expressions, each with an oracle of its own, for tests of structured replies."""

from __future__ import annotations

import json
import random
import re
from typing import Any

__all__ = ["options_of_a_case", "satisfies"]

# Accents before hexadecimal digits, emoji, spaces, escapes, and the names of byte tokens and of control tokens.
WORDS = (
    "New York", "größe", "ße1", "é", "naïf", "🦙", "👩‍👩‍👧", "a\tb", "line\nbreak", "back\\slash", 'quo"te', "<0x0A>",
    "<|end|>", "▁mark", " lead", "trail ", "", "日本", "x" * 30, "a/b~c", "\u00a0", "{}", "0",
)  # fmt: skip
_PARTS = (
    "[a-c]{1,3}", "(yes|no)", "é+x?", "[0-9]{2}", "🦙?", " ", "ß[ä-ü]", "<0x0A>", "\\.", "\\n", "(a|bc){0,2}",
    "<\\|end\\|>", "[<]s>", "\\t", '"', "\\\\", "ße[0-9a-f]", "[^a-z]", "\\u00e9",
)  # fmt: skip
_PATTERNS = ("^[a-c]{1,3}$", "^(größe|New York)$", "^é ?[0-9]$", '^[a-b"]{1,2}$', "^\\\\x$", "^<\\|end\\|>$", "^a\\tb$")


def _schema(source: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose replies are short."""
    kinds = ["enum", "const", "integer", "boolean", "string", "null", "pattern"]
    kinds += ["object", "array", "anyOf", "named"] * (depth > 0)
    kind = source.choice(kinds)
    if kind == "enum":
        return {"enum": [*source.sample(WORDS, 3), source.choice([None, True, -3, 1.5])]}
    if kind == "const":
        return {"const": source.choice([source.choice(WORDS), {source.choice(WORDS): [source.choice(WORDS), 1]}])}
    if kind == "integer":
        return {"type": "integer", "minimum": source.randint(-20, 0), "maximum": source.randint(1, 300)}
    if kind == "string":
        return {"type": "string", "maxLength": source.randint(1, 5)}
    if kind == "pattern":
        return {"type": "string", "pattern": source.choice(_PATTERNS)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "array":
        return {"type": "array", "items": _schema(source, depth - 1), "minItems": 1, "maxItems": source.randint(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [_schema(source, depth - 1), _schema(source, depth - 1)]}
    if kind == "named":
        return _named(source, depth)
    names = source.sample(WORDS, source.randint(1, 3))
    properties = {name: _schema(source, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _named(source: random.Random, depth: int) -> dict[str, Any]:
    """An object whose keys are given by a pattern, of its properties or of their names."""
    pattern, values = source.choice(_PATTERNS), _schema(source, depth - 1)
    sizes = {"type": "object", "minProperties": 1, "maxProperties": 1}
    if source.random() < 0.5:
        return {**sizes, "patternProperties": {pattern: values}, "additionalProperties": False}
    return {**sizes, "propertyNames": {"pattern": pattern}, "additionalProperties": values}


def options_of_a_case(seed: int) -> dict[str, Any]:
    """The options of a random case: one kind of structure, greedy or at temperature 3."""
    source = random.Random(seed)
    kind = source.choice(["json_schema", "json_schema", "regex", "grammar"])
    options: dict[str, Any] = {"temperature": 3.0, "seed": seed} if source.random() < 0.6 else {"do_sample": False}
    if kind == "json_schema":
        return {**options, kind: _schema(source, 2)}
    if kind == "regex":
        return {**options, kind: "".join(source.choices(_PARTS, k=source.randint(1, 5)))}
    rules = [" ".join(json.dumps(word, ensure_ascii=False) for word in source.sample(WORDS, 2)) for _ in range(3)]
    return {**options, kind: "root ::= " + " | ".join(rules)}


def satisfies(options: dict[str, Any], text: str, is_valid: Any) -> bool:
    """Whether a reply is of its structure, by `re`, by the literals of the grammar, or by `is_valid(value, schema)`."""
    if "regex" in options:
        return re.fullmatch(options["regex"], text) is not None
    if "grammar" in options:
        rules = options["grammar"].removeprefix("root ::= ")
        literal = r'"(?:[^"\\]|\\.)*"'
        allowed = re.findall(f"({literal}) ({literal})", rules)
        return text in [json.loads(first) + json.loads(second) for first, second in allowed]
    return bool(is_valid(json.loads(text), options["json_schema"]))
