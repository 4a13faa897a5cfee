"""Odd JSON texts, and a loop that sends values of hypothesis, one after another, for a given time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Value = TypeVar("Value")


class _TimeIsUpError(Exception):
    pass


def send_for(lasts_s: float, values: st.SearchStrategy[Value], send: Callable[[Value], object]) -> int:
    """Send random values for `lasts_s` seconds; returns how many. An exception of `send` is raised with its value."""
    until_s, sent = time.monotonic() + lasts_s, 0

    @settings(
        max_examples=10_000_000,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(value=values)
    def send_one(value: Value) -> None:
        nonlocal sent
        if time.monotonic() > until_s:
            raise _TimeIsUpError
        send(value)
        sent += 1

    with contextlib.suppress(_TimeIsUpError):
        send_one()
    return sent


NUMBERS = (
    *(
        "0",
        "-0.0",
        "1",
        "-1",
        "0.5",
        "1e-46",
        "1e-45",
        "1.2e-38",
        "5e-324",
        "1e-400",
        "1e39",
        "1e308",
        "1e400",
        "-1e400",
    ),
    *("NaN", "Infinity", "-Infinity", "9223372036854775807", "9223372036854775808", "-9223372036854775809"),
    *("18446744073709551616", "9" * 400, "9" * 5000, "1e" + "9" * 400),
)
_TEXTS = ('""', '"a"', r'"\ud800"', r'"\udfff\ud800"', r'"\u0000"', '"' + "x" * 70_000 + '"', '"alpha"', '"\U0001f600"')
_NESTED = ("[" * 50 + "]" * 50, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[" * 100_000)


def odd_json() -> st.SearchStrategy[str]:
    """JSON texts with values that parsers and number types treat differently, and texts that are almost JSON.

    They contain numbers that vanish or overflow, halves of surrogate pairs, long texts, deep nesting and keys that
    stand twice.
    """
    plain = odd_scalars() | st.sampled_from([*_NESTED, "null", "true", "false", "[]", "{}"])
    return st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
            | odd_object(st.sampled_from(["a", "a", "role", "content", "type", "name"]), inner)
        ),
        max_leaves=5,
    )


def odd_scalars() -> st.SearchStrategy[str]:
    """The numbers and texts of `odd_json`."""
    return st.sampled_from([*NUMBERS, *_TEXTS])


def odd_object(keys: st.SearchStrategy[str], values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """JSON objects of these keys and values (JSON texts); a key may stand twice."""
    return st.lists(st.tuples(keys, values), max_size=3).map(object_text)


def object_text(pairs: Iterable[tuple[str, str]]) -> str:
    """A JSON object of these keys and values (JSON texts), in order."""
    return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}"
