"""The phases of a scenario, and the problem that truly holds in each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml

from resplit.config import ClusterConfig, parse_cluster
from resplit.errors import ConfigError
from resplit.phases import LinkState, NodeState, declared_phase, phases_of, problem_in
from resplit.scenario import ScenarioConfig
from tests.support.decisions import FAR, FAST, SLOW, halves, problem
from tests.support.three_devices import THREE_DEVICES

DAY = """
name: day
duration: 60 s
nodes:
  - { at: 5 s, node: slow, slowdown: 4, label: throttles }
  - { at: 9 s, node: slow, background_utilization: 0.5, label: backup }
  - { at: 9 s, node: far, up: false, label: lost }
links:
  - { at: 9 s, between: [slow, fast], latency: 52 ms, label: far away }
  - { at: 12 s, between: [fast, slow], bandwidth: 16 Mbit/s, label: and narrow }
load:
  - { at: 5 s, request_class: chat, rate_rps: 3, label: surge }
"""


@pytest.fixture(scope="module")
def cluster() -> ClusterConfig:
    return parse_cluster(THREE_DEVICES, "three.yaml")


def scenario(text: str = DAY, **changes: Any) -> ScenarioConfig:
    return ScenarioConfig.model_validate(yaml.safe_load(text) | changes)


def test_each_phase_begins_with_its_changes_and_keeps_the_earlier_ones(cluster: ClusterConfig) -> None:
    phases = phases_of(cluster, scenario())
    assert [(phase.at_s, phase.labels) for phase in phases] == [
        (0.0, ()),
        (5.0, ("throttles", "surge")),
        (9.0, ("backup", "lost", "far away")),
        (12.0, ("and narrow",)),
    ]
    assert phases[0] == declared_phase(cluster, scenario())
    assert phases[2].changed == {SLOW, FAR, (FAST, SLOW)}
    assert phases[3].nodes == {FAST: NodeState(), SLOW: NodeState(4.0, 0.5), FAR: NodeState(up=False)}
    assert phases[3].links == {(FAST, SLOW): LinkState(pytest.approx(0.052), 2e6)}
    assert [phase.rates_rps["chat"] for phase in phases] == [0.5, 3, 3, 3]


def test_the_problem_of_a_phase_is_that_of_the_changed_cluster(cluster: ClusterConfig) -> None:
    posed, phases = problem(halves(FAST, SLOW)), phases_of(cluster, scenario())
    last = problem_in(posed, phases[-1], phases[0])
    assert last.decode_s_per_token[0, :2] == pytest.approx([1e-3, 8e-3])
    assert np.isnan(last.decode_s_per_token[:, 2]).all()
    assert np.isnan(last.prefill_s_per_token[:, 2]).all()
    assert [node.background_utilization for node in last.nodes] == pytest.approx([0.1, 0.6, 0.1])
    for i, j in ((0, 1), (1, 0)):
        assert last.link_latency_s[i, j] == pytest.approx(0.052)
        assert last.link_bandwidth_bytes_per_s[i, j] == pytest.approx(2e6)
    assert last.link_latency_s[0, 2] == posed.link_latency_s[0, 2]
    assert last.classes[0].rate_rps == 3
    unchanged = problem_in(posed, phases[0], phases[0])
    assert np.array_equal(unchanged.decode_s_per_token, posed.decode_s_per_token)
    assert posed.link_latency_s[0, 1] == 2e-3


def test_a_change_at_the_start_is_in_the_first_phase(cluster: ClusterConfig) -> None:
    change = {"at": "0 s", "node": SLOW, "slowdown": 2, "label": "slow today"}
    (phase,) = phases_of(cluster, scenario(nodes=[change], links=[], load=[]))
    assert (phase.at_s, phase.labels, phase.nodes[SLOW].slowdown) == (0.0, ("slow today",), 2)


def test_a_link_that_is_down_is_no_link(cluster: ClusterConfig) -> None:
    change = {"at": "3 s", "between": [FAR, FAST], "up": False, "label": "cut"}
    phases = phases_of(cluster, scenario(nodes=[], links=[change], load=[]))
    cut = problem_in(problem(halves(FAST, SLOW)), phases[-1], phases[0])
    assert np.isnan(cut.link_latency_s[[0, 2], [2, 0]]).all()
    assert np.isnan(cut.link_bandwidth_bytes_per_s[[0, 2], [2, 0]]).all()


def test_a_real_link_cannot_change() -> None:
    real = parse_cluster(
        {**THREE_DEVICES, "links": None, "nodes": [{"name": n, "memory": "1 GiB"} for n in (FAST, SLOW)]}, "x"
    )
    with pytest.raises(ConfigError, match="fast and slow have no emulated link"):
        phases_of(real, scenario(nodes=[]))
