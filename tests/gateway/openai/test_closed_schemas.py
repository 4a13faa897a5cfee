"""Objects of an answer have the listed properties only, unless their schema speaks of others."""

from __future__ import annotations

from typing import Any

import pytest

from resplit.gateway.openai.closed_schemas import closed

NAMED = {"type": "object", "properties": {"n": {"type": "null"}}}
CLOSED = {**NAMED, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (NAMED, CLOSED),
        ({"type": "array", "items": NAMED}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [NAMED, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/a", "$defs": {"a": NAMED}}, {"$ref": "#/$defs/a", "$defs": {"a": CLOSED}}),
        (
            {"type": "object", "properties": {"properties": NAMED}},
            {"type": "object", "properties": {"properties": CLOSED}, "additionalProperties": False},
        ),
    ],
)
def test_an_object_has_the_listed_properties_only(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert closed(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {**NAMED, "additionalProperties": {"type": "null"}},
        {**NAMED, "patternProperties": {"^x": {}}},
        {**NAMED, "required": ["other"]},
        {"allOf": [NAMED, {"type": "object", "properties": {"m": {}}}]},
        {**NAMED, "anyOf": [{"required": ["n"]}, {"required": ["m"]}]},
        {"const": NAMED},
    ],
)
def test_a_schema_that_speaks_of_other_properties_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema
