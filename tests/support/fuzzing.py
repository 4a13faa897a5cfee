"""Send values that hypothesis generates, one after another, for a given time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
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
