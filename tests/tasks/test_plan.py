"""What the control loop keeps and computes between its steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from resplit.decide import History, PastMove, Settings
from resplit.epochs import LiveEpoch
from resplit.session_records import SessionRecord
from tasks.plan import load_history, measured_since, registry_speed, save_history


def record(arrival_s: float, latency_s: float, request_class: str = "chat", status: int = 200) -> SessionRecord:
    end_s = arrival_s + latency_s if status == 200 else math.nan
    return SessionRecord(request_class, arrival_s, math.nan, end_s, 8, 8, status, (1,), (), True, ())


def epoch(loaded_bytes: float, prepare_s: float) -> LiveEpoch:
    return LiveEpoch(1, 0.0, "re-split", ("a", "b"), None, None, loaded_bytes, prepare_s)


def test_measured_counts_what_arrived_since_and_ended() -> None:
    records = [record(1, 9), record(5, 2), record(6, 4), record(7, 1, status=429)]
    measured = measured_since(records, {"chat": 2.5}, 4.0)
    assert measured is not None
    assert (measured.latency_s, measured.requests, measured.slo_missed) == (3.0, 2, ("chat",))
    assert measured.error_s == pytest.approx(1 / math.sqrt(2))


def test_an_objective_met_on_average_is_not_missed_and_a_class_without_one_never() -> None:
    records = [record(5, 2), record(6, 4), record(6, 99, "batch")]
    measured = measured_since(records, {"chat": 3.5, "batch": None}, 0.0)
    assert measured is not None
    assert measured.slo_missed == ()


def test_nothing_measured_is_none() -> None:
    assert measured_since([record(1, 2)], {"chat": 1.0}, 3.0) is None


def test_the_registry_speed_is_what_loading_took() -> None:
    epochs = [epoch(loaded_bytes=100.0, prepare_s=2.0), epoch(loaded_bytes=0.0, prepare_s=9.0)]
    assert registry_speed([*epochs, epoch(loaded_bytes=300.0, prepare_s=2.0)]) == 100.0
    assert registry_speed([epochs[1]]) is None


def test_history_survives_from_tick_to_tick_even_with_an_infinite_price(tmp_path: Path) -> None:
    move = PastMove(3.0, "re-split", ("a", "b"), ("b", "b"), None, math.inf)
    history = History().moved(move, Settings())
    save_history(history, tmp_path / "history.json")
    assert load_history(tmp_path / "history.json") == history
    assert load_history(tmp_path / "none.json") == History()
