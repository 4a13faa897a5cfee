"""Emulated clusters that this machine is too slow for are refused."""

from __future__ import annotations

import pytest

from resplit.config import ClusterConfig
from resplit.errors import ConfigError
from resplit.model.source import StoredModel
from resplit.node.emulation_check import PassShape, check_emulation, measure_work

SLOW = {"embed": "10 ms", "layer": "20 ms", "head": "30 ms"}


def cluster(rate_rps: float = 0.5, decode: dict[str, str] = SLOW, emulated: bool = True) -> ClusterConfig:
    node = {"name": "alpha", "memory": "8 MiB"}
    emulate = {"decode_per_token": decode, "prefill_per_token": {"embed": "0 ms", "layer": "1 ms", "head": "0 ms"}}
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alpha",
            "trusted": ["alpha"],
            "nodes": [node | ({"emulate": emulate} if emulated else {})],
            "links": {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}},
            "classes": [
                {"name": "chat", "rate_rps": rate_rps, "prompt_tokens": 12, "new_tokens": 9},
                {"name": "short", "rate_rps": 0.01, "prompt_tokens": 12, "new_tokens": 1},
            ],
            "kv_tokens": 256,
        }
    )


def test_a_cluster_within_the_limits_of_this_machine_is_accepted(stored_model: StoredModel) -> None:
    check_emulation(cluster(), stored_model)


def test_a_declared_time_below_the_measured_one_is_refused_with_node_kind_and_times(stored_model: StoredModel) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_emulation(cluster(decode=SLOW | {"head": "0.1 us"}), stored_model)
    message = str(refusal.value)
    assert "nodes.alpha.emulate" in message
    assert "'head'" in message
    assert "0.0001 ms" in message
    assert "truly needs" in message


def test_more_work_than_the_cores_can_do_is_refused(stored_model: StoredModel) -> None:
    work_s = measure_work(cluster(), stored_model)
    kinds = ["embed", *["layer"] * 6, "head"]
    request_s = sum(work_s[kind, PassShape(12, 0)] + 8 * work_s[kind, PassShape(1, 16)] for kind in kinds)
    check_emulation(cluster(rate_rps=0.2 / request_s), stored_model, cores=1)
    with pytest.raises(ConfigError, match=r"classes: .* lower rate_rps"):
        check_emulation(cluster(rate_rps=3 / request_s), stored_model, cores=1)
    check_emulation(cluster(rate_rps=3 / request_s), stored_model, cores=16)


def test_real_hardware_is_not_checked(stored_model: StoredModel) -> None:
    check_emulation(cluster(rate_rps=1e9, emulated=False), stored_model, cores=1)
