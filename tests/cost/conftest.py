"""The telemetry of a small cluster, and the cost model fitted to it."""

from __future__ import annotations

import pytest

from resplit.config import ClusterConfig
from resplit.cost import CostModel, fit_cost_model
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures
from tests.support.telemetry import MACHINES, block_features, telemetry_of


@pytest.fixture(scope="session")
def features() -> tuple[BlockFeatures, ...]:
    return block_features()


@pytest.fixture(scope="session")
def telemetry(features: tuple[BlockFeatures, ...]) -> Telemetry:
    return telemetry_of(MACHINES, features)


@pytest.fixture(scope="session")
def model(telemetry: Telemetry, features: tuple[BlockFeatures, ...]) -> CostModel:
    return fit_cost_model(telemetry, features)


@pytest.fixture(scope="session")
def cluster() -> ClusterConfig:
    times = {"embed": "1 ms", "layer": "3 ms", "head": "6 ms"}
    emulate = {"decode_per_token": times, "prefill_per_token": times}
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "home-a",
            "nodes": [{"name": name, "memory": "400 MiB", "emulate": emulate} for name in MACHINES],
            "trusted": ["home-a", "home-b"],
            "classes": [{"name": "chat", "rate_rps": 0.5, "prompt_tokens": 64, "new_tokens": 32}],
            "links": {"default": {"latency": "3 ms", "bandwidth": "160 Mbit/s"}},
            "kv_tokens": 2048,
        }
    )
