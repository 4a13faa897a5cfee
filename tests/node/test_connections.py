"""A node's connections: links as declared, and a new connection only for a new address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from resplit.errors import DataError
from resplit.model.source import StoredModel
from resplit.node.connections import Connections
from resplit.security.authority import keys_command
from resplit.security.identity import Member
from resplit.wire.addresses import Address
from resplit.wire.emulated_link import Shape
from tests.support.hostile import HostileNode
from tests.support.in_process import in_process
from tests.support.three_nodes import A, B, C, three_node_config
from tests.support.two_nodes import two_node_config

TIMES = {"embed": "1 ms", "layer": "1 ms", "head": "1 ms"}
EMULATE = {"decode_per_token": TIMES, "prefill_per_token": TIMES}
HERE, THERE = Address("127.0.0.1", 1), Address("127.0.0.1", 2)


@pytest.fixture
async def connections(tmp_path: Path) -> AsyncIterator[Connections]:
    keys_command(tmp_path, ["plain", "trusted"])
    made = Connections("plain", two_node_config(emulate=EMULATE), Member.load(tmp_path / "plain"))
    yield made
    await made.disconnect()


async def test_links_have_their_declared_shape(connections: Connections) -> None:
    assert list(connections.links) == ["trusted"]
    assert connections.links["trusted"].shape == Shape(1e-3, 125e6)
    assert connections.link_to_gateway is connections.links["trusted"]


async def test_only_a_changed_address_makes_a_new_connection(connections: Connections) -> None:
    connections.connect({"plain": HERE, "trusted": HERE})
    first = connections.peer("trusted")
    connections.connect({"trusted": HERE})
    assert connections.peer("trusted") is first
    connections.connect({"trusted": THERE})
    assert connections.peer("trusted").address == THERE
    assert list(connections.peers) == ["trusted"], "a node has no connection to itself"
    await first.disconnect()


async def test_a_node_without_an_address_cannot_be_reached(connections: Connections) -> None:
    with pytest.raises(DataError, match="plain has no address of node 'trusted'"):
        connections.peer("trusted")


async def test_a_node_added_later_gets_the_link_of_its_command(connections: Connections) -> None:
    connections.connect({"late": HERE}, {"late": Shape(0.5, 1e6)})
    assert connections.links["late"].shape == Shape(0.5, 1e6)
    connections.set_links({"late": Shape(0.25, 2e6)})
    assert connections.peer("late").link.shape == Shape(0.25, 2e6)


async def test_a_node_that_has_left_the_cluster_is_not_measured_any_more(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    leaver = HostileNode()
    async with in_process(three_node_config(), stored_model, tmp_path, {C: leaver.service}) as nodes:
        everybody = {name: str(address) for name, address in nodes.addresses.items()}
        await nodes.command(A, "connect", nodes.connect_body(everybody))
        assert A in leaver.callers_of("Echo")
        leaver.heard.clear()
        await nodes.command(A, "connect", nodes.connect_body({name: everybody[name] for name in (A, B)}))
        assert A not in leaver.callers_of("Echo")
        await nodes.command(A, "connect", nodes.connect_body(everybody))
        assert A in leaver.callers_of("Echo")
