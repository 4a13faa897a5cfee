"""Schemas that would take minutes or all memory to compile are refused before, and usual ones are not."""

from __future__ import annotations

from typing import Any

import pytest

from resplit.errors import RequestError
from resplit.gateway.openai.grammars import json_rule
from resplit.gateway.openai.schema_cost import ensure_compilable
from resplit.gateway.openai.text import Text

FORMATS = ["date-time", "date", "time", "email", "uuid", "ipv4", "ipv6", "hostname", "duration"]


def _object(count: int, rule: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": rule for index in range(count)}}


def _pattern(index: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f".*{index}.*"}


def _chain(count: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f".*{count}.*"} | ({"anyOf": [_chain(count - 1)]} if count else {})


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [_pattern(index) for index in range(200)]},
        {"allOf": [_object(1, _pattern(index)) for index in range(200)]},
        _chain(30),
        {"$ref": "#/$defs/a0", "$defs": {f"a{i}": _pattern(i) | {"$ref": f"#/$defs/a{i + 1}"} for i in range(30)}},
        _object(30_000, {"type": "string"}),
        {"type": "array", "prefixItems": [True] * 30_000},
        {"type": "object", "patternProperties": {f"^x{index}y": {} for index in range(500)}},
        {"type": "integer", "multipleOf": 1_000_003},
        {"type": "number", "multipleOf": 1.000003},
        {"allOf": [{"type": "integer", "multipleOf": number} for number in (97, 101, 103)]},
    ],
    ids=lambda schema: "/".join(schema),
)
def test_a_schema_that_costs_too_much_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        ensure_compilable([schema])


@pytest.mark.parametrize(
    "schema",
    [
        {},
        _object(300, {"type": "string", "maxLength": 80}),
        {"type": "object", "properties": {name: {"type": "string", "format": name} for name in FORMATS}},
        _object(1, {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None, "title": "T"}),
        {"allOf": [{"$ref": "#/$defs/a"}], "description": "d", "$defs": {"a": _object(20, _pattern(1))}},
        {"enum": [f"value {index}" for index in range(3000)]},
        {"type": "number", "multipleOf": 0.01},
        {"type": "integer", "multipleOf": 1_000_000},
    ],
    ids=lambda schema: "/".join(schema) or "any",
)
def test_a_usual_schema_compiles(text: Text, schema: dict[str, Any]) -> None:
    ensure_compilable([schema])
    text.grammars().compiled(f"start: {json_rule(schema)}")


def test_the_schemas_of_all_tools_count_together() -> None:
    schema = _object(1000, {"type": "string"})
    ensure_compilable([schema] * 2)
    with pytest.raises(RequestError, match="values"):
        ensure_compilable([schema] * 20)
