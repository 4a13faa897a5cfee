"""The measured latency from session records, and the loading rate from epochs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from resplit.decide import Settings, for_a_change, measured_since, registry_bytes_per_s
from resplit.epochs import LiveEpoch
from resplit.session_records import SessionRecord


def session(arrival_s: float, latency_s: float, request_class: str = "chat", status: int = 200) -> SessionRecord:
    end_s = arrival_s + latency_s if status == 200 else math.nan
    return SessionRecord(request_class, arrival_s, end_s, end_s, 8, 4, status, (1,), (), True, ())


def test_only_requests_that_arrived_in_the_window_and_completed_count() -> None:
    records = [session(1, 9), session(5, 2), session(6, 4), session(7, 1, status=429)]
    measured = measured_since(records, {"chat": 2.5}, 5.0)
    assert measured is not None
    assert (measured.latency_s, measured.requests, measured.slo_missed) == (3.0, 2, ("chat",))
    assert measured.error_s == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(("slo_s", "missed"), [(2.9, ("chat",)), (3.0, ()), (3.5, ())])
def test_a_class_misses_its_objective_if_its_mean_latency_is_above_it(slo_s: float, missed: tuple[str, ...]) -> None:
    records = [session(5, 2), session(6, 4), session(6, 99, "batch")]
    measured = measured_since(records, {"chat": slo_s, "batch": None, "unused": 0.1}, 0.0)
    assert measured is not None
    assert measured.slo_missed == missed


def test_without_completed_requests_nothing_is_measured() -> None:
    assert measured_since([session(1, 2), session(4, 2, status=503)], {"chat": 1.0}, 3.0) is None


def epoch(longest_load_bytes: float, prepare_s: float) -> LiveEpoch:
    loaded_bytes = 3 * longest_load_bytes  # several nodes load in parallel
    return LiveEpoch(
        1, 0.0, "initial", ("a",), 1.0, None, loaded_bytes, prepare_s, longest_load_bytes=longest_load_bytes
    )


def test_the_loading_rate_is_over_the_epochs_that_loaded_weights() -> None:
    assert registry_bytes_per_s([epoch(100.0, 2.0), epoch(0.0, 9.0), epoch(300.0, 2.0)]) == 100.0
    assert registry_bytes_per_s([epoch(1.0, 0.5)]) == 2.0


@pytest.mark.parametrize("epochs", [[], [epoch(0.0, 9.0)], [epoch(5.0, 0.0)]])
def test_without_loading_there_is_no_rate(epochs: list[LiveEpoch]) -> None:
    assert registry_bytes_per_s(epochs) is None


@pytest.mark.parametrize(
    ("committed_s", "often"),
    [((80.0, 90.0, 100.0), False), ((80.001, 90.0, 100.0), True), ((90.0, 100.0), False), ((), False)],
)
def test_a_change_waits_for_the_cooldown_after_three_epochs_within_twenty_seconds(
    committed_s: tuple[float, ...], often: bool
) -> None:
    epochs = [replace(epoch(0.0, 1.0), committed_s=moment_s) for moment_s in committed_s]
    settings = for_a_change(Settings(cooldown_s=7.0), epochs, now_s=100.0)
    assert settings.cooldown_s == (7.0 if often else 0.0)


def test_the_settings_for_a_change_have_the_rate_of_loading_that_was_seen() -> None:
    settings = for_a_change(Settings(threshold=0.2), [epoch(300.0, 2.0)], now_s=1000.0)
    assert settings == Settings(threshold=0.2, cooldown_s=0.0, registry_bytes_per_s=150.0)
