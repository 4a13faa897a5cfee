"""Sends made-up things, one after another, for a while: hypothesis makes them up, time says when it is enough."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Thing = TypeVar("Thing")


class _TimeIsUpError(Exception):
    pass


def send_for(lasts_s: float, things: st.SearchStrategy[Thing], send: Callable[[Thing], object]) -> int:
    """How many were sent; each run makes up others. What `send` raises is raised with the thing that it was for."""
    until_s, sent = time.monotonic() + lasts_s, 0

    @settings(
        max_examples=10_000_000,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(thing=things)
    def send_one(thing: Thing) -> None:
        nonlocal sent
        if time.monotonic() > until_s:
            raise _TimeIsUpError
        send(thing)
        sent += 1

    with contextlib.suppress(_TimeIsUpError):
        send_one()
    return sent
