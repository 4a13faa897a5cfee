"""The record of a run, from the reports of gateway, nodes and controller."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from resplit.config import load_cluster
from resplit.decide import Decision
from resplit.epochs import LiveEpoch
from resplit.metrics import summarise
from resplit.scenario import ScenarioConfig
from resplit.session_records import SessionMove, SessionRecord
from resplit.status import ClusterStatus, NodeStatus
from resplit.telemetry.tables import NODE_COLUMNS, Telemetry
from resplit.workload import ScheduledRequest
from tasks.measure import measure
from tasks.workload import Sent

ROOT = Path(__file__).parents[2]
START_S = 1000.0


class FixedClient:
    """A control client that answers the same at every call."""

    def records(self, skip: int) -> list[SessionRecord]:
        served = SessionRecord(
            request_class="chat",
            arrival_s=START_S + 1,
            first_token_s=START_S + 2,
            end_s=START_S + 4,
            prompt_tokens=9,
            new_tokens=3,
            status=200,
            epochs=(7, 8),
            moves=(SessionMove(epoch=8, pause_s=0.25, cache_bytes=1000),),
            private_ok=True,
            token_times_s=(START_S + 2, START_S + 3, START_S + 4),
        )
        refused = replace(served, status=429, first_token_s=math.nan, end_s=math.nan, token_times_s=(), moves=())
        return [served, refused, served][skip:]

    def status(self) -> ClusterStatus:
        hub = NodeStatus(
            "hub", 1, emulated=True, emulation_error=0.01, address="127.0.0.1:1", answers=True, drained=False
        )
        unused = replace(hub, node="unused", emulation_error=0.7)
        return ClusterStatus("home", "tiny", "", ("embed", "head"), 8, None, None, None, (hub, unused), 0, 0, "yes")

    def telemetry(self, since_s: float) -> Telemetry:
        node = dict.fromkeys(NODE_COLUMNS, 0.0) | {
            "time_s": since_s + 5,
            "node": "hub",
            "cpu_utilization": 0.4,
            "own_utilization": 0.3,
        }
        return Telemetry.from_rows({"nodes": [node]})

    def epochs(self) -> list[LiveEpoch]:
        def epoch(number: int, committed_s: float, action: str, loaded_bytes: float) -> LiveEpoch:
            return LiveEpoch(number, committed_s, action, ("hub", "hub"), 2.0, None, loaded_bytes, 1.0)

        return [
            epoch(6, START_S - 60, "initial", 5.0),
            epoch(7, START_S - 1, "initial", 5.0),
            epoch(8, START_S + 3, "re-split", 500.0),
        ]

    def decisions(self, since: int) -> list[Decision]:
        return [Decision(START_S + 2.5, "re-split", id=since + 1)]


def test_a_record_holds_only_its_own_run_with_times_since_its_start() -> None:
    cluster = load_cluster(ROOT / "data" / "clusters" / "home.yaml")
    scenario = ScenarioConfig(name="test", duration="10 s")
    sent = Sent(START_S, 3, (ScheduledRequest(8.0, "chat", "hello", 3),))
    record = measure.fn(FixedClient(), cluster, scenario, "resplit", 1, sent, 1, 4)  # type: ignore[arg-type]
    assert list(record.requests.status) == [429, 200, 0]
    assert record.requests.arrival_s.tolist() == [1.0, 1.0, 8.0]
    assert list(record.epochs.epoch) == [7, 8]
    assert list(record.epochs.action) == ["initial", "re-split"]
    assert record.epochs.moved_bytes.tolist() == [0.0, 1500.0]
    assert record.epochs.pause_s.tolist() == [0.0, 0.25]
    assert record.decisions == (Decision(2.5, "re-split", id=5),)
    assert (record.blocks, record.emulated_nodes) == (("embed", "head"), ("hub", "unused"))
    assert record.emulation_error == 0.01, "of the nodes that served"
    assert record.use.time_s.tolist() == [5.0]
    metrics = summarise(record)
    assert (metrics.offered, metrics.completed, metrics.reconfigurations) == (3, 1, 1)
    assert math.isclose(metrics.latency_mean_s, 3.0)
