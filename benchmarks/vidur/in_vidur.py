"""Runs one case in Vidur's own environment: the case as JSON on standard input, latencies as JSON on standard output.

Imports nothing of resplit. Of Vidur it replaces the requests and the times of passes, and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from vidur.config import (
    CacheConfig,
    ClusterConfig,
    MetricsConfig,
    ReplicaConfig,
    SarathiSchedulerConfig,
    SimulationConfig,
)
from vidur.entities import Request
from vidur.execution_time_predictor import ExecutionTimePredictorRegistry
from vidur.request_generator import RequestGeneratorRegistry
from vidur.simulator import Simulator


@dataclass(frozen=True)
class Time:
    """What a pass takes, in seconds."""

    total_time: float
    model_time: float


class Times:
    """F + m n for each pass of n requests through a stage."""

    def __init__(self, fixed_s: float, session_s: float) -> None:
        self._fixed_s, self._session_s = fixed_s, session_s

    def get_execution_time(self, batch: Any, pipeline_stage: int) -> Time:
        """The time of a batch; `pipeline_stage` makes no difference."""
        seconds = self._fixed_s + self._session_s * len(batch.requests)
        return Time(seconds, seconds)


class Given:
    """Hands out requests that were made before."""

    def __init__(self, requests: list[Any]) -> None:
        self._requests = requests

    def generate(self) -> list[Any]:
        """All of them."""
        return self._requests


def main() -> None:
    """Simulate the case."""
    case = json.load(sys.stdin)
    # The first token comes with the prompt's pass, as in resplit.
    requests = [Request(at_s, 1, case["passes"]) for at_s in case["arrivals_s"]]
    ExecutionTimePredictorRegistry.get = lambda *_, **__: Times(case["fixed_s"], case["session_s"])
    RequestGeneratorRegistry.get = lambda *_, **__: Given(requests)
    with tempfile.TemporaryDirectory() as folder:
        config = SimulationConfig(
            cluster_config=ClusterConfig(
                replica_config=ReplicaConfig(num_pipeline_stages=case["stages"]),
                cache_config=CacheConfig(num_blocks=10**6),
                replica_scheduler_config=SarathiSchedulerConfig(batch_size_cap=case["most"] * case["stages"]),
            ),
            metrics_config=MetricsConfig(write_metrics=False, enable_chrome_trace=False, output_dir=folder),
        )
        Simulator(config).run()
    sys.stdout.write("\n" + json.dumps([request.completed_at - request.arrived_at for request in requests]) + "\n")


if __name__ == "__main__":
    main()
