"""The cluster as the controller sees it: which nodes answer, and what the gateway is told of a changed file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from resplit.config import ClusterConfig
from resplit.control.cluster_view import ClusterView
from resplit.model.source import StoredModel
from resplit.types import BlockFeatures
from resplit.wire.addresses import Address
from tests.support.three_nodes import A, B, C, three_node_config


class ToldGateway:
    """The part of a gateway that the view needs. It keeps what it was told."""

    def __init__(self) -> None:
        self.connected = {C, A}
        self.told: list[tuple[ClusterConfig, Sequence[BlockFeatures], frozenset[str]]] = []

    def connected_nodes(self) -> set[str]:
        return self.connected

    def reconfigure(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        self.told.append((cluster, features, drained))


@pytest.fixture
def gateway() -> ToldGateway:
    return ToldGateway()


@pytest.fixture
def view(stored_model: StoredModel, gateway: ToldGateway) -> ClusterView:
    told: Any = gateway
    return ClusterView(three_node_config(), stored_model, {name: Address("127.0.0.1", 1) for name in (A, B, C)}, told)


def test_nodes_that_answer_come_in_the_order_of_the_file_and_the_others_sorted(
    view: ClusterView, gateway: ToldGateway
) -> None:
    assert (view.reachable, view.unreachable) == ([A, C], [B])
    gateway.connected = {"stranger"}
    assert (view.reachable, view.unreachable) == ([], [A, B, C])
    assert view.lost_from((C, A, A)) == [A, C]


def test_the_gateway_gets_a_changed_file_with_the_private_blocks_of_it(view: ClusterView, gateway: ToldGateway) -> None:
    changed, addresses = three_node_config(private_layers=3), {A: Address("127.0.0.1", 2)}
    view.adopt(changed, frozenset({B}), addresses)
    ((cluster, features, drained),) = gateway.told
    assert (cluster, drained) == (changed, {B})
    assert [index for index, block in enumerate(features) if block.private] == [0, 1, 2, 3, 7]
    assert (view.cluster, view.addresses, view.rules.drained) == (changed, addresses, {B})
    assert tuple(view.rules.features) == tuple(features)
