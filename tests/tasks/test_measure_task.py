"""The record of a run is what gateway and controller said, in the run's own time."""

from __future__ import annotations

import math
from pathlib import Path

from resplit.config import ScenarioConfig, load_cluster
from resplit.metrics import summarise
from tasks.measure import measure
from tasks.workload import ScheduledRequest, Sent

ROOT = Path(__file__).parents[2]
START_S = 1000.0


class Said:
    """What a controller answered once, to be read again: the shapes are those of the control API."""

    def records(self, skip: int) -> list[dict[str, object]]:
        served = {
            "request_class": "chat",
            "arrival_s": START_S + 1,
            "first_token_s": START_S + 2,
            "end_s": START_S + 4,
            "prompt_tokens": 9,
            "new_tokens": 3,
            "status": 200,
            "epochs": [7, 8],
            "moves": [{"epoch": 8, "pause_s": 0.25, "cache_bytes": 1000, "replayed": False}],
            "private_ok": True,
            "token_times_s": [START_S + 2, START_S + 3, START_S + 4],
        }
        refused = served | {"status": 429, "first_token_s": None, "end_s": None, "token_times_s": [], "moves": []}
        return [served, refused, served][skip:]

    def status(self) -> dict[str, object]:
        return {"blocks": ["embed", "head"], "nodes": [{"node": "hub", "emulated": True, "emulation_error": 0.01}]}

    def telemetry(self, since_s: float) -> dict[str, list[dict[str, object]]]:
        row = {"time_s": since_s + 5, "node": "hub", "cpu_utilization": 0.4, "own_utilization": 0.3}
        return {"nodes": [row]}

    def epochs(self) -> list[dict[str, object]]:
        common = {"placement": ["hub", "hub"], "predicted_latency_s": 2.0, "lower_bound": None, "prepare_s": 1.0}
        return [
            common | {"epoch": 6, "committed_s": START_S - 60, "action": "initial", "loaded_bytes": 5.0},
            common | {"epoch": 7, "committed_s": START_S - 1, "action": "initial", "loaded_bytes": 5.0},
            common | {"epoch": 8, "committed_s": START_S + 3, "action": "re-split", "loaded_bytes": 500.0},
        ]

    def decisions(self, since: int) -> list[dict[str, object]]:
        return [{"id": since + 1, "at_s": START_S + 2.5, "action": "re-split"}]


def test_a_record_speaks_of_its_own_run_alone() -> None:
    cluster = load_cluster(ROOT / "data" / "clusters" / "home.yaml")
    scenario = ScenarioConfig(name="test", duration="10 s")
    sent = Sent(START_S, 3, (ScheduledRequest(8.0, "chat", "hello", 3),))
    record = measure.fn(Said(), cluster, scenario, "resplit", 1, sent, 1, 4)  # type: ignore[arg-type]
    assert list(record.requests.status) == [429, 200, 0]
    assert record.requests.arrival_s.tolist() == [1.0, 1.0, 8.0]
    assert list(record.epochs.epoch) == [7, 8]
    assert list(record.epochs.action) == ["initial", "re-split"]
    assert record.epochs.moved_bytes.tolist() == [0.0, 1500.0]
    assert record.epochs.pause_s.tolist() == [0.0, 0.25]
    assert record.decisions[0]["at_s"] == 2.5
    assert record.use.time_s.tolist() == [5.0]
    metrics = summarise(record)
    assert (metrics.offered, metrics.completed, metrics.reconfigurations) == (3, 1, 1)
    assert math.isclose(metrics.latency_mean_s, 3.0)
