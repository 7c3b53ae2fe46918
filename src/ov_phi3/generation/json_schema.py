"""JSON schemas: their text, with the class that they came from, and a check of a value by the standard library alone.

The check knows the assertions of JSON Schema 2020-12 (https://json-schema.org/draft/2020-12/json-schema-validation)
that decide about types, values, properties, items and their combinations. Keywords that it does not know, and patterns
that Python's `re` cannot read, it does not check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

__all__ = ["SchemaText", "problem_of", "value_of"]

_DEEPEST = 200  # schemas inside schemas; deeper ones are not checked
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: (isinstance(value, int) and not isinstance(value, bool)) or _is_whole(value),
}


class SchemaText(str):
    """The text of a schema, with the class that it describes.

    Attributes:
        model: a class with `model_json_schema` and `model_validate`, as pydantic's models have them.
    """

    model: Any

    def __new__(cls, text: str, model: Any) -> SchemaText:
        """A text and its class."""
        made = super().__new__(cls, text)
        made.model = model
        return made

    def __getnewargs__(self) -> tuple[str, Any]:  # type: ignore[override]
        return str(self), self.model


def value_of(text: str, schema: str) -> Any:
    """The value of a reply in JSON: of a `SchemaText`, an object of its class.

    Raises:
        ValueError: it is not JSON, or not of the schema; the message says what is wrong.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"it is not JSON: {exc}") from exc
    if problem := problem_of(value, json.loads(schema)):
        raise ValueError(problem)
    if not isinstance(schema, SchemaText):
        return value
    try:
        return schema.model.model_validate(value)
    except Exception as exc:
        raise ValueError(f"{schema.model.__name__} does not accept it: {exc}") from exc


def problem_of(value: Any, schema: Any) -> str | None:
    """What in a value is not of the schema, as a sentence; None if nothing is."""
    return next(_Check(schema).problems(value, schema, "$", 0), None)


class _Check:
    """One check; holds the whole schema, in which references are looked up."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def problems(self, value: Any, schema: Any, at: str, depth: int) -> Iterator[str]:
        """All that is wrong with a value at a place."""
        if schema is False:
            yield f"{at} must not be there"
        if not isinstance(schema, Mapping) or depth > _DEEPEST:
            return
        yield from _simple_problems(value, schema, at)
        if "$ref" in schema and (target := self._target(schema["$ref"])) is not None:
            yield from self.problems(value, target, at, depth + 1)
        yield from self._combined(value, schema, at, depth)
        if isinstance(value, dict):
            yield from self._of_properties(value, schema, at, depth)
        if isinstance(value, list):
            yield from self._of_items(value, schema, at, depth)

    def _target(self, reference: Any) -> Any:
        """What a reference inside the schema points to; None if it points elsewhere."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found = self._root
        for part in reference[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (LookupError, TypeError, ValueError):
                return None
        return found

    def _holds(self, value: Any, schema: Any, at: str, depth: int) -> bool:
        return next(self.problems(value, schema, at, depth + 1), None) is None

    def _combined(self, value: Any, schema: Mapping[str, Any], at: str, depth: int) -> Iterator[str]:
        for part in schema.get("allOf", ()):
            yield from self.problems(value, part, at, depth + 1)
        if "anyOf" in schema and not any(self._holds(value, part, at, depth) for part in schema["anyOf"]):
            yield f"{at} is none of anyOf"
        if "oneOf" in schema and sum(self._holds(value, part, at, depth) for part in schema["oneOf"]) != 1:
            yield f"{at} is not exactly one of oneOf"
        if "not" in schema and self._holds(value, schema["not"], at, depth):
            yield f"{at} is what 'not' excludes"
        if "if" in schema:
            branch = "then" if self._holds(value, schema["if"], at, depth) else "else"
            yield from self.problems(value, schema.get(branch, True), at, depth + 1)

    def _of_properties(self, value: dict[str, Any], schema: Mapping[str, Any], at: str, depth: int) -> Iterator[str]:
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{at} has no {name!r}"
        for name, others in schema.get("dependentRequired", {}).items():
            if name in value and (missing := [other for other in others if other not in value]):
                yield f"{at} has {name!r} and no {missing[0]!r}"
        for name, part in schema.get("dependentSchemas", {}).items():
            if name in value:
                yield from self.problems(value, part, at, depth + 1)
        yield from _count_problems(len(value), schema, at, "Properties")
        for name, item in value.items():
            where = f"{at}.{name}"
            matching = [patterns[pattern] for pattern in patterns if _found(pattern, name) is not False]
            if name in named:
                yield from self.problems(item, named[name], where, depth + 1)
            for part in matching if all(_found(pattern, name) is not None for pattern in patterns) else ():
                yield from self.problems(item, part, where, depth + 1)
            if name not in named and not matching:
                yield from self.problems(item, schema.get("additionalProperties", True), where, depth + 1)
            if "propertyNames" in schema:
                yield from self.problems(name, schema["propertyNames"], f"the name {name!r} in {at}", depth + 1)

    def _of_items(self, value: list[Any], schema: Mapping[str, Any], at: str, depth: int) -> Iterator[str]:
        yield from _count_problems(len(value), schema, at, "Items")
        items = schema.get("items", True)
        # Before 2020-12 the first items were a list in "items", and the rest "additionalItems".
        old = isinstance(items, list)
        first = items if old else schema.get("prefixItems", [])
        rest = schema.get("additionalItems", True) if old else items
        for index, item in enumerate(value):
            part = first[index] if index < len(first) else rest
            yield from self.problems(item, part, f"{at}[{index}]", depth + 1)
        if "contains" in schema:
            least, most = schema.get("minContains", 1), schema.get("maxContains", len(value))
            if not least <= sum(self._holds(item, schema["contains"], at, depth) for item in value) <= most:
                yield f"{at} does not have the items that 'contains' demands"
        if schema.get("uniqueItems") is True and any(_same(a, b) for i, a in enumerate(value) for b in value[:i]):
            yield f"{at} has an item twice"


def _simple_problems(value: Any, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    """Problems that need only the value itself."""
    if (kinds := schema.get("type")) is not None:
        names = [kinds] if isinstance(kinds, str) else kinds
        if not any(name not in _TYPES or _TYPES[name](value) for name in names):
            yield f"{at} is {_shown(value)}; expected {' or '.join(map(str, names))}"
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        yield f"{at} is {_shown(value)}, which is not in its enum"
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{at} is {_shown(value)}; expected {_shown(schema['const'])}"
    if isinstance(value, str):
        yield from _count_problems(len(value), schema, at, "Length")
        if "pattern" in schema and _found(schema["pattern"], value) is False:
            yield f"{at} is {_shown(value)}, which does not match {schema['pattern']!r}"
    if _TYPES["number"](value):
        yield from _number_problems(value, schema, at)


def _number_problems(value: float, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    for name, wrong in (
        ("minimum", lambda bound: value < bound),
        ("maximum", lambda bound: value > bound),
        ("exclusiveMinimum", lambda bound: value <= bound),
        ("exclusiveMaximum", lambda bound: value >= bound),
        ("multipleOf", lambda step: step > 0 and Fraction(str(value)) % Fraction(str(step)) != 0),
    ):
        bound = schema.get(name)
        if _TYPES["number"](bound) and wrong(bound):  # type: ignore[no-untyped-call]
            yield f"{at} is {_shown(value)}; expected {name} {bound}"


def _count_problems(count: int, schema: Mapping[str, Any], at: str, what: str) -> Iterator[str]:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}")
    if count < least or (most is not None and count > most):
        yield f"{at} has {count} {what.lower()}; expected {least} to {'any number' if most is None else most}"


def _found(pattern: str, text: str) -> bool | None:
    """Whether a pattern occurs in a text; None if `re` cannot tell, or might take exponential time."""
    if re.search(r"\)[*+?{]", pattern):
        return None
    try:
        return re.search(pattern, text) is not None
    except re.error:
        return None


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON: 1 and 1.0 are the same, true and 1 are not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
