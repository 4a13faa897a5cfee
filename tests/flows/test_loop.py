"""The flows on a real cluster: they profile it, decide, and continue to decide after the loss of a node."""

from __future__ import annotations

import signal

import pytest

from flows.adapt import adapt
from flows.profile import profile
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("prefect_server")]


def test_profile_fits_every_node_and_a_tick_decides(cluster: Cluster) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        begun, epoch = len(client.decisions()), client.model().epoch
    valid, cost = profile(cluster.url, cluster.state)
    assert set(cost.reference_s) == set(cluster.config.node_names)
    assert valid.failed == 0
    moves = adapt(cluster.url, cluster.state, window_s=30.0, fast_loop_for_s=0.0)
    with ControlClient(cluster.url, cluster.token) as client:
        assert len(client.decisions()) == begun + 1
        decision = client.decisions()[-1]
        assert client.model().epoch == epoch + moves
    assert {alternative.action for alternative in decision.alternatives} == {"keep", "redistribute", "re-split"}


def test_the_loop_continues_after_the_loss_of_a_node(cluster: Cluster) -> None:
    cluster.processes["delta"].send_signal(signal.SIGKILL)
    cluster.processes["delta"].wait()
    with ControlClient(cluster.url, cluster.token) as client:
        before = len(client.decisions())
        adapt(cluster.url, cluster.state, window_s=30.0, fast_loop_for_s=0.0)
        newest = client.decisions()[-1]
        assert len(client.decisions()) > before
        assert "delta" not in client.model().placement
    seen = {node.name: node.usable for node in newest.nodes}
    assert seen == {"alpha": True, "beta": True, "gamma": True, "delta": False}
