"""Small run records for tests, built row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resplit.records import TABLES, RunRecord, table

NAN = float("nan")


def request(
    arrival_s: float, end_s: float = NAN, status: int = 200, slo_s: float = NAN, **other: object
) -> dict[str, object]:
    """A row of the table `requests`: by default served at once by one epoch."""
    row: dict[str, object] = {
        "request_class": "chat",
        "first_token_s": NAN,
        "prompt_tokens": 4,
        "new_tokens": 1,
        "private_ok": True,
        "waited_s": 0.0,
        "computed_s": 0.0,
        "hops_s": 0.0,
    }
    return row | {"arrival_s": arrival_s, "end_s": end_s, "status": status, "slo_s": slo_s, "epochs": 1} | other


def record(
    requests: list[dict[str, object]],
    tokens: Sequence[float] = (),
    duration_s: float = 60.0,
    **tables: list[dict[str, object]],
) -> RunRecord:
    """A run with these requests, with one token at each moment of `tokens`; tables that are not given are empty."""
    at_moments: list[dict[str, object]] = [{"time_s": at, "request": 0} for at in tokens]
    rows = {"tokens": at_moments, "requests": requests} | tables
    kept: dict[str, Any] = {name: table(name, rows.get(name, [])) for name in TABLES}
    return RunRecord("static", "test", 0, duration_s, **kept)


def epoch(number: int, time_s: float, action: str, **other: object) -> dict[str, object]:
    """A row of the table `epochs`."""
    row: dict[str, object] = {
        "epoch": number,
        "time_s": time_s,
        "action": action,
        "placement": "a,b",
        "predicted_latency_s": 1.0,
    }
    return row | {"lower_bound": 0.9, "moved_bytes": 0.0, "pause_s": NAN} | other
