"""What JSON schemas may cost to compile: llguidance sets no bound to the time and memory that some of them take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from resplit.errors import RequestError

_MOST_VALUES = 10_000  # the time grows with the square of the properties of an object
_MOST_COMBINED = 8  # patterns for one text: each doubles the memory
_MOST_REMAINDERS = 10_000  # of `multipleOf`: each is a state
_MOST_KEY_PATTERNS = 50  # in `patternProperties`: each is compared with each
_PATTERNS = ("pattern", "format")
_REFERENCES = ("allOf", "anyOf", "oneOf", "$ref")
_RULES = (*_PATTERNS, "multipleOf", "properties", "patternProperties", "additionalProperties", "items", "prefixItems")


def ensure_compilable(schemas: Sequence[Mapping[str, Any]]) -> None:
    """RequestError if the schemas of one request may take more than seconds or a few hundred megabytes to compile."""
    values = 0
    for schema in schemas:
        nodes = []
        for value in _values(schema):
            values += 1
            if values > _MOST_VALUES:
                raise RequestError(f"the schemas have more than {_MOST_VALUES} values; make them smaller")
            if isinstance(value, Mapping):
                nodes.append(value)
        combined = any(map(combines, nodes))
        _check_patterns(nodes, combined)
        _check_key_patterns(nodes)
        _check_multiples(nodes, combined)


def objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All objects in a JSON value."""
    return (value for value in _values(schema) if isinstance(value, Mapping))


def _values(schema: Any) -> Iterator[Any]:
    """A JSON value and all values in it."""
    left = [schema]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, Mapping | list):
            left += value.values() if isinstance(value, Mapping) else value


def combines(node: Mapping[str, Any]) -> bool:
    """Whether what follows this part of a schema must also follow another part."""
    used = sum(key in node for key in _REFERENCES) + any(key in node for key in _RULES)
    return used > 1 or (isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1)


def _check_patterns(nodes: Sequence[Mapping[str, Any]], combined: bool) -> None:
    found = {(key, node[key]) for node in nodes for key in _PATTERNS if isinstance(node.get(key), str)}
    if combined and len(found) > _MOST_COMBINED:
        rule = f"with 'allOf', or with references beside other rules, it may have {_MOST_COMBINED}"
        raise RequestError(f"a schema has {len(found)} different patterns and formats; {rule}")


def _check_key_patterns(nodes: Sequence[Mapping[str, Any]]) -> None:
    found = [node["patternProperties"] for node in nodes if isinstance(node.get("patternProperties"), Mapping)]
    if sum(map(len, found)) > _MOST_KEY_PATTERNS:
        raise RequestError(f"'patternProperties' of a schema may have {_MOST_KEY_PATTERNS} patterns in all")


def _check_multiples(nodes: Sequence[Mapping[str, Any]], combined: bool) -> None:
    numbers = {node["multipleOf"] for node in nodes if isinstance(node.get("multipleOf"), int | float)}
    found = [_digits(number) for number in numbers if number]
    if max([math.lcm(*found)] if combined else found, default=0) > _MOST_REMAINDERS:
        rule = f"without zeros at the end it may be {_MOST_REMAINDERS}, also for the common multiple of several"
        raise RequestError(f"'multipleOf' has too many digits; {rule}")


def _digits(number: float) -> int:
    """The digits of a number as an integer, without zeros at the end."""
    digits = "".join(map(str, Decimal(str(abs(number))).as_tuple().digits))
    return int(digits.rstrip("0") or "0")
