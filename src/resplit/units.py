"""Numbers and quantities of configuration files (`7`, `420 MiB`, `3 ms`) as plain SI numbers; shows bytes."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

_BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_WATTS = {"mW": 1e-3, "W": 1.0, "kW": 1e3}
_BITS_PER_SECOND = {"bit/s": 1, "kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9}
_MOST = 1e18  # nothing that a file describes is larger; what is computed from it stays finite
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z/]+)\s*", re.IGNORECASE)


def shown_bytes(count: float) -> str:
    """An amount of memory for people, such as "1.21 GiB" or "420.0 MiB"."""
    for unit, digits in (("GiB", 2), ("MiB", 1), ("KiB", 1)):
        if abs(count) >= _BYTES[unit]:
            return f"{count / _BYTES[unit]:.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def shown_exactly(count: float) -> str:
    """An amount of memory for people, and its bytes for those who compute with it: "1.0 KiB (1025 bytes)"."""
    shown = shown_bytes(count)
    return shown if shown.endswith("bytes") else f"{shown} ({count:.0f} bytes)"


def parse_quantity(value: object, units: dict[str, float]) -> float:
    """`value` such as "3 ms" in the base unit of `units`; ValueError names the units that are allowed."""
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError(
            f"{value!r} needs a number and one of the units {', '.join(units)}, such as {_example(units)!r}"
        )
    quantity = float(match[1]) * units[match[2]]
    if quantity > _MOST:
        raise ValueError(f"{value!r} is too large: the most is {_MOST:.0e} {next(u for u in units if units[u] == 1)}")
    return quantity


def _number(value: object) -> object:
    """`value`, unless it is true or false (in YAML also `yes` and `off`), which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _example(units: dict[str, float]) -> str:
    return f"5 {list(units)[1]}"


def _bytes(value: object) -> float:
    return parse_quantity(value, _BYTES)


def _seconds(value: object) -> float:
    return parse_quantity(value, _SECONDS)


def _bytes_per_s(value: object) -> float:
    return parse_quantity(value, _BITS_PER_SECOND) / 8


def _watts(value: object) -> float:
    return parse_quantity(value, _WATTS)


def _schema(units: dict[str, float]) -> WithJsonSchema:
    pattern = rf"^\s*[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?\s*({'|'.join(units)})\s*$"
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [_example(units)]})


Count = Annotated[int, BeforeValidator(_number), Field(le=2**31 - 1)]
Number = Annotated[float, BeforeValidator(_number), Field(le=1e9, allow_inf_nan=False)]
Bytes = Annotated[float, BeforeValidator(_bytes), _schema(_BYTES)]
Seconds = Annotated[float, BeforeValidator(_seconds), _schema(_SECONDS)]
BytesPerSecond = Annotated[float, BeforeValidator(_bytes_per_s), _schema(_BITS_PER_SECOND)]
Watts = Annotated[float, BeforeValidator(_watts), _schema(_WATTS)]
