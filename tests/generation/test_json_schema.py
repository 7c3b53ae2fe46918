"""The check of replies against their schemas: by the standard library, on cases of the published test suite's kinds."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from ov_phi3 import ConfigError, GenerationConfig
from ov_phi3.generation.json_schema import SchemaText, problem_of, value_of

NODE = {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}
VALID: list[tuple[Any, Any]] = [
    ({"type": "integer"}, 3),
    ({"type": "integer"}, 3.0),
    ({"type": ["string", "null"]}, None),
    ({"enum": ["größe", 1]}, 1.0),
    ({"const": {"a": [1, {"b": None}]}}, {"a": [1, {"b": None}]}),
    ({"properties": {"a": {"type": "string"}}, "additionalProperties": False}, {"a": "x"}),
    ({"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, [1, "a"]),
    ({"pattern": "^é+$", "minLength": 2}, "éé"),
    ({"multipleOf": 0.1}, 0.3),
    ({"anyOf": [{"type": "null"}, {"minimum": 3}]}, 3),
    ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, 4),
    ({"pattern": "^(a+)+$"}, "a" * 40 + "b"),  # not checked: it might take exponential time
    ({"unknown keyword": 1}, 1),
    (NODE, {"next": {"next": {}}}),
    ({"$ref": "#"}, 1),
]
INVALID: list[tuple[Any, Any, str]] = [
    ({"type": "integer"}, 3.5, "expected integer"),
    ({"type": "integer"}, True, "expected integer"),
    ({"enum": [1]}, True, "enum"),
    ({"const": "a"}, "b", 'expected "a"'),
    ({"required": ["a"]}, {}, "no 'a'"),
    ({"properties": {"a": {"type": "string"}}}, {"a": 1}, r"\$\.a is 1"),
    ({"additionalProperties": False}, {"b": 1}, r"\$\.b must not"),
    ({"items": {"type": "string"}}, ["a", 2], r"\$\[1\] is 2"),
    ({"prefixItems": [{}], "items": False}, [1, 2], r"\$\[1\] must not"),
    ({"minItems": 2}, [1], "1 items"),
    ({"maxLength": 2}, "abc", "3 length"),
    ({"pattern": "^a"}, "b", "does not match"),
    ({"exclusiveMinimum": 3}, 3, "exclusiveMinimum"),
    ({"anyOf": [{"type": "null"}, {"minimum": 3}]}, 1, "anyOf"),
    ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, 6, "oneOf"),
    ({"not": {"type": "string"}}, "", "excludes"),
    ({"uniqueItems": True}, [1, 1.0], "twice"),
    (NODE, {"next": {"next": 1}}, r"\$\.next\.next is 1"),
]


class Person:
    """A class as pydantic's models are."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}

    @classmethod
    def model_validate(cls, value: Any) -> Person:
        if not value["name"]:
            raise ValueError("a name has letters")
        return cls(value["name"])


@pytest.mark.parametrize(("schema", "value"), VALID)
def test_valid(schema: Any, value: Any) -> None:
    assert problem_of(value, schema) is None


@pytest.mark.parametrize(("schema", "value", "words"), INVALID)
def test_invalid(schema: Any, value: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem_of(value, schema))


def test_a_model_class_is_a_schema() -> None:
    config = GenerationConfig(json_schema=Person).resolve(room=9)
    assert isinstance(config.json_schema, SchemaText)
    assert config.to_dict()["json_schema"] == config.json_schema
    for copy in (config, pickle.loads(pickle.dumps(config)), config.replace(max_new_tokens=3)):
        person = value_of('{"name": "Ada"}', copy.json_schema)
        assert (type(person), person.name) == (Person, "Ada")
    with pytest.raises(ValueError, match="Person does not accept it: a name has letters"):
        value_of('{"name": ""}', config.json_schema)
    with pytest.raises(TypeError, match="not the class int"):
        GenerationConfig(json_schema=int)  # type: ignore[arg-type]


def test_a_model_class_without_a_schema_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Person, "model_json_schema", classmethod(lambda cls: 1 / 0))
    with pytest.raises(ConfigError, match="Person has no JSON schema: division by zero"):
        GenerationConfig(json_schema=Person)
