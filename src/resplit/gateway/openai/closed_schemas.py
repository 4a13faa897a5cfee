"""Schemas whose objects have the listed properties only.

A schema that does not say so allows others too. Small models then add properties without end, and tools refuse them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resplit.gateway.openai.schema_cost import combines, objects

_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems")
_SAYS_MORE = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema without other properties than the listed ones, wherever it does not speak of others.

    A schema that combines several for one value stays as it is: each of them lists a part of the properties.
    """
    if any(map(combines, objects(schema))):
        return schema
    found: Mapping[str, Any] = _closed(schema)
    return found


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _SCHEMAS_BY_NAME:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _closed(each) for name, each in found[key].items()}
    for key in _SCHEMA_LISTS:
        if isinstance(found.get(key), list):
            found[key] = [_closed(each) for each in found[key]]
    if "items" in found:
        found["items"] = _closed(found["items"])
    if _lists_all(found):
        found["additionalProperties"] = False
    return found


def _lists_all(schema: Mapping[str, Any]) -> bool:
    """Whether a schema of an object lists every property of which it speaks."""
    listed, needed = schema.get("properties"), schema.get("required", [])
    if not isinstance(listed, Mapping) or not isinstance(needed, list) or any(key in schema for key in _SAYS_MORE):
        return False
    return all(isinstance(name, str) and name in listed for name in needed)
