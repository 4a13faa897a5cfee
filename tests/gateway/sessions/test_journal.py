"""The demand and the summaries of recoveries that the journal computes from given arrivals and moves."""

from __future__ import annotations

import time

import pytest

from resplit.gateway.sessions.journal import Journal
from resplit.session_records import RecoveredSessions, RequestArrival, SessionMove, SessionRecovery
from tests.support.three_nodes import three_node_config


def class_config(name: str, rate_rps: float) -> dict[str, object]:
    return {"name": name, "rate_rps": rate_rps, "prompt_tokens": 8, "new_tokens": 4}


def test_demand_counts_recent_arrivals_of_each_class_apart() -> None:
    journal = Journal(three_node_config(classes=[class_config("chat", 1), class_config("batch", 0.5)]))
    now_s = time.time()
    for ago_s, name in [(30, "chat"), (5, "chat"), (1, "chat"), (1, "batch")]:
        journal.arrived(RequestArrival(name, now_s - ago_s, 20, 10))
    chat, batch = journal.demand(20.0)
    # The declared demand counts as ten seconds of observation: ten requests of chat, five of batch.
    assert chat.rate_rps == pytest.approx((2 + 10) / 30)
    assert chat.prompt_tokens == pytest.approx((2 * 20 + 10 * 8) / 12)
    assert chat.new_tokens == pytest.approx((2 * 10 + 10 * 4) / 12)
    assert batch.rate_rps == pytest.approx((1 + 5) / 30)


def test_the_rate_that_is_expected_follows_the_requests_of_each_class() -> None:
    now_s = 1000.0
    config = three_node_config(classes=[class_config("chat", 1), class_config("batch", 0.5)])
    journal = Journal(config, lambda: now_s)
    declared = journal.rates()
    assert {name: rate.mean for name, rate in declared.items()} == pytest.approx({"chat": 1.0, "batch": 0.5})
    for _ in range(200):  # four requests in a second
        now_s += 0.25
        journal.arrived(RequestArrival("chat", now_s, 20, 10))
        journal.arrived(RequestArrival("unknown", now_s, 20, 10))
    seen = journal.rates()
    assert seen["chat"].mean == pytest.approx(4.0, rel=0.1)
    assert seen["chat"].deviation < 2 * declared["chat"].deviation
    assert seen["batch"].mean < 0.25


def test_a_changed_cluster_file_changes_what_is_expected_of_changed_classes_only() -> None:
    now_s = 1000.0
    journal = Journal(three_node_config(classes=[class_config("chat", 1), class_config("batch", 1)]), lambda: now_s)
    for _ in range(200):
        now_s += 0.25
        journal.arrived(RequestArrival("chat", now_s, 20, 10))
        journal.arrived(RequestArrival("batch", now_s, 20, 10))
    journal.reconfigure(three_node_config(classes=[class_config("chat", 1), class_config("batch", 9)]))
    rates = journal.rates()
    assert rates["chat"].mean == pytest.approx(4.0, rel=0.1)
    assert rates["batch"].mean == pytest.approx(9.0)


def recovered(epoch: int, waited_s: float, restored: int, cache_bytes: int) -> SessionMove:
    recovery = SessionRecovery(0.1, waited_s, 0.2, 0.3, restored, 2)
    return SessionMove(epoch, 1.0, cache_bytes, True, recovery)


def test_recoveries_of_an_epoch_give_the_longest_times_and_the_sums_of_positions_and_bytes() -> None:
    journal = Journal(three_node_config())
    for move in (recovered(3, 0.5, 10, 100), recovered(3, 0.9, 20, 50), recovered(4, 7.0, 99, 1)):
        journal.recovered(move)
    assert journal.recoveries(3) == RecoveredSessions(
        sessions=2,
        noticed_s=0.1,
        waited_s=0.9,
        restore_s=0.2,
        replay_s=0.3,
        restored_positions=30,
        replayed_positions=4,
        cache_bytes=150,
    )
    assert journal.recoveries(5) is None
