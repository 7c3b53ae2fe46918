"""Structured output that GenAI's XGrammar would get wrong without an error (openvino-genai 2026.4.1).

Each rule was found by comparing replies with their structure; tests/backends/test_structured_random.py looks for more.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ov_phi3.generation.config import GenerationConfig

__all__ = ["obeyed_schema", "unsupported_structure"]

# XGrammar writes these letters as "\xE4" and reads a hexadecimal digit behind them as part of the number.
_MISREAD = re.compile("[\u0080-\u00ff][0-9a-fA-F]")
_ESCAPED = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
# Characters that JSON escapes: XGrammar writes them into keys, and texts with a pattern, as they are.
_JSON_ESCAPED = [*map(chr, range(0x20)), '"', "\\"]
_ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated"}
)
_IGNORED = (
    "oneOf", "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "contains", "multipleOf",
    "uniqueItems", "propertyNames", "additionalItems", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_ALONE = ("$ref", "anyOf", "allOf", "const", "enum")
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_NEEDS_TYPE = {"pattern": "string", "minLength": "string", "maxLength": "string", "format": "string"}
_NEEDS_TYPE |= {**dict.fromkeys(("minItems", "maxItems"), "array"), **dict.fromkeys(_BOUNDS, "integer")}
_HOLD_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_HOLD_SCHEMAS = frozenset({"additionalProperties", "unevaluatedProperties", "items", "prefixItems", "anyOf", "allOf"})
_LONGEST, _LARGEST = 200, 100_000
_FORMATS = ("date", "date-time", "uuid")
# One character of a regular expression: an escape, a class, or a plain character.
_ATOM = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|c[A-Za-z]|.)|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_NOT_CHARACTERS = frozenset("^$()|*+?{}")


def unsupported_structure(config: GenerationConfig) -> str | None:
    """Why a structure would not be obeyed, and what to do; None if it would be."""
    kind = config.structure
    if kind is None:
        return None
    problem = _problem(config, kind)
    return problem and f"{problem} Load with backend='infer_request' for it."


@functools.lru_cache(64)
def obeyed_schema(text: str) -> str:
    """A schema whose texts of bounded length have a pattern instead, as XGrammar needs them.

    It would allow control characters in them, which JSON does not. Above `_LONGEST` the pattern would take it seconds.
    """
    return json.dumps(_with_patterns(json.loads(text)), ensure_ascii=False)


def _with_patterns(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_patterns(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    new = dict(schema)
    for key in _HOLD_NAMED & schema.keys():
        if isinstance(schema[key], dict):
            new[key] = {name: _with_patterns(part) for name, part in schema[key].items()}
    for key in _HOLD_SCHEMAS & schema.keys():
        new[key] = _with_patterns(schema[key])
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    bounded = least or most != ""
    if schema.get("type") == "string" and bounded and "pattern" not in schema and max(least, most or 0) <= _LONGEST:
        new = {key: part for key, part in new.items() if key not in ("minLength", "maxLength")}
        new["pattern"] = f'^[^"\\\\\\x00-\\x1f]{{{least},{most}}}$'
    return new


def _problem(config: GenerationConfig, kind: str) -> str | None:
    if config.num_sequences > 1:
        return (
            f"{kind} with num_return_sequences={config.num_return_sequences}: backend='llm_pipeline' would apply it to "
            "the first reply only."
        )
    if config.ignore_eos:
        return f"{kind} with ignore_eos=True: backend='llm_pipeline' would go on without it behind its end."
    problem = _problem_of_text(kind, str(getattr(config, kind)))
    return problem and f"{kind} {problem}"


@functools.lru_cache(64)
def _problem_of_text(kind: str, text: str) -> str | None:
    if kind == "grammar":
        return _misread(_ESCAPED.sub(lambda match: chr(int(match[1] or match[2] or match[3], 16)), text))
    if kind == "json_schema":
        if len(text) > _LARGEST:
            return f"has {len(text)} characters: backend='llm_pipeline' takes up to {_LARGEST} in a reasonable time."
        try:
            schema = json.loads(text)
            return next(_schema_problems(schema), None) or next(_reference_problems(schema, schema), None)
        except RecursionError:
            return "is nested too deeply for backend='llm_pipeline'."
    return _misread_regex(text)


def _misread_regex(regex: str) -> str | None:
    """A part of a regular expression that XGrammar takes for another one."""
    previous = ""
    atoms = _ATOM.findall(regex)
    for atom, following in zip(atoms, [*atoms[1:], ""], strict=True):
        odd_escape = re.fullmatch(r"\\[0-9A-Za-z]", atom) and atom[1] not in "dDwWsSnrtfvbB"
        odd_start = atom == "^" and previous not in ("", "(", "|")
        odd_end = atom == "$" and following not in ("", ")", "|")
        if odd_escape or odd_start or odd_end or (atom[0] == "[" and "[" in re.sub(r"\\.", "", atom[1:])):
            return f"contains {atom!r} (in {regex[:60]!r}), which backend='llm_pipeline' would read as something else."
        previous = atom
    return None


def _misread(literal: str) -> str | None:
    if (found := _MISREAD.search(literal)) is None:
        return None
    return (
        f"contains {found[0]!r} (in {literal[:60]!r}): backend='llm_pipeline' would read the letter and the digit "
        "behind it as another character."
    )


def _schema_problems(schema: Any) -> Iterator[str]:
    """What is not obeyed in a schema, and in the schemas that it holds."""
    if not isinstance(schema, dict):
        return
    yield from _keyword_problems(schema)
    yield from _object_problems(schema)
    for literal in (*_texts(schema.get("const")), *_texts(schema.get("enum"))):
        if problem := _misread(literal):
            yield problem
    yield from _text_problems(schema)
    for key in _HOLD_NAMED:
        held = schema.get(key)
        for part in held.values() if isinstance(held, dict) else ():
            yield from _schema_problems(part)
    for key in _HOLD_SCHEMAS:
        held = schema.get(key)
        for part in held if isinstance(held, list) else [held]:
            yield from _schema_problems(part)


def _reference_problems(schema: Any, root: dict[str, Any]) -> Iterator[str]:
    """References out of the schema, which allow anything, and circles of references, which never end."""
    if isinstance(schema, list):
        for part in schema:
            yield from _reference_problems(part, root)
    elif isinstance(schema, dict):
        seen: list[str] = []
        at: Any = schema
        while isinstance(at, dict) and isinstance(target := at.get("$ref"), str):
            if not target.startswith("#"):
                yield f"refers to {target!r}, which backend='llm_pipeline' would not look up."
                break
            if target in seen:
                yield f"refers to {target!r} in a circle, which backend='llm_pipeline' would never leave."
                break
            seen.append(target)
            at = root
            for name in target[1:].split("/")[1:]:
                at = at.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
        for part in schema.values():
            yield from _reference_problems(part, root)


def _keyword_problems(schema: dict[str, Any]) -> Iterator[str]:
    """Keywords that have no effect, alone or beside others."""
    kinds = schema.get("type")
    types = kinds if isinstance(kinds, list) else [kinds]
    for key in _IGNORED:
        if key in schema and schema[key] is not False:
            yield f"has {key!r}, which backend='llm_pipeline' would ignore."
    for key in _ALONE:
        others = schema.keys() - _ANNOTATIONS - {key} if key in schema else set()
        if key in ("const", "enum") and _are_of([schema.get(key)] if key == "const" else schema.get(key), types):
            others -= {"type"}
        if others:
            yield f"has {key!r} beside {min(others)!r}, one of which backend='llm_pipeline' would ignore."
    if len(schema.get("allOf", [0])) != 1:
        yield "has 'allOf' with several schemas, which backend='llm_pipeline' would ignore."
    for key, needed in _NEEDS_TYPE.items():
        if key in schema and (needed not in types or ("number" in types and key in _BOUNDS)):
            yield f"has {key!r} without \"type\": {needed!r}: backend='llm_pipeline' would not obey it."


_NAMES = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object", int: "integer"}


def _are_of(values: Any, types: list[Any]) -> bool:
    """Whether values are of one of the types."""
    kinds = {_NAMES.get(type(value), "number") for value in values} if isinstance(values, list) else {""}
    return kinds <= {*types, *(["integer"] if "number" in types else [])}


def _object_problems(schema: dict[str, Any]) -> Iterator[str]:
    properties, patterns = schema.get("properties"), schema.get("patternProperties")
    keys = list(properties) if isinstance(properties, dict) else []
    for key in keys:
        if any(character in key for character in _JSON_ESCAPED):
            yield f"has the key {key!r}: backend='llm_pipeline' would not escape it."
        if problem := _misread(key):
            yield problem
    required = schema.get("required")
    missing = [name for name in required if name not in keys] if isinstance(required, list) else []
    if missing:
        yield f"requires {missing[0]!r}, which is not in its properties: backend='llm_pipeline' would leave it out."
    if patterns and keys:
        yield "has 'patternProperties' beside 'properties', one of which backend='llm_pipeline' would ignore."
    for pattern in patterns if isinstance(patterns, dict) else ():
        if problem := _pattern_problem(pattern):
            yield problem


def _text_problems(schema: dict[str, Any]) -> Iterator[str]:
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        if problem := _pattern_problem(pattern):
            yield problem
        for other in ("minLength", "maxLength", "format"):
            if other in schema:
                yield f"has 'pattern' beside {other!r}, which backend='llm_pipeline' would ignore."
    if "format" in schema and schema["format"] not in _FORMATS:
        yield f"has the format {schema['format']!r}: backend='llm_pipeline' obeys {', '.join(_FORMATS)}."


def _pattern_problem(pattern: str) -> str | None:
    """A pattern inside a JSON text is obeyed if it allows nothing that JSON escapes."""
    if problem := _misread_regex(pattern):
        return problem
    depth = 0
    for atom in _ATOM.findall(pattern):
        depth += {"(": 1, ")": -1}.get(atom, 0)
        if atom == "|" and depth == 0:
            return f"has the pattern {pattern!r} with '|' outside of a group: backend='llm_pipeline' would misread it."
        if atom not in _NOT_CHARACTERS and _allows_escaped(atom):
            return (
                f"has the pattern {pattern!r}, whose {atom!r} allows characters that JSON escapes: "
                "backend='llm_pipeline' would write them as they are."
            )
    return None


@functools.lru_cache(256)
def _allows_escaped(atom: str) -> bool:
    if re.fullmatch(r"\\c[A-Za-z]", atom):
        return True
    try:
        return any(re.fullmatch(atom, character, re.DOTALL) for character in _JSON_ESCAPED)
    except re.error:
        return False  # XGrammar refuses it, or it stands for an assertion


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, its keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
