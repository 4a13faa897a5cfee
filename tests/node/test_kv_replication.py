"""KV replicas on a node: they use free memory only, and are freed for the node's own blocks and caches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from resplit.errors import CapacityError
from resplit.model.activation import Activation
from resplit.model.source import StoredModel
from resplit.node.executor import Executor
from resplit.security.identity import CONTROLLER
from resplit.wire.cache_stream import OutgoingPart
from resplit.wire.emulated_link import Shape
from resplit.wire.peers import CHUNK_BYTES
from tests.support.in_process import InProcessCluster, in_process
from tests.support.two_nodes import commit, layer_bytes, prepare, take_caches, two_node_config

ONE = ["trusted", "trusted", "plain", *["trusted"] * 5]
TWO = ["trusted", "trusted", "plain", "plain", *["trusted"] * 4]
KV_TOKENS = 64


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """`plain` has memory for two layers with their reserved caches, and not one byte more."""
    async with in_process(
        two_node_config(f"{2 * layer_bytes(stored_model, KV_TOKENS):.0f} B"), stored_model, tmp_path
    ) as running:
        yield running


async def replicated_blocks(nodes: InProcessCluster) -> list[int]:
    state = await nodes.state("plain")
    assert state.held_bytes <= state.memory_bytes
    return list(state.copies)


async def test_a_replica_takes_no_reserved_memory(nodes: InProcessCluster) -> None:
    await prepare(nodes, TWO, 1)
    with pytest.raises(CapacityError, match="no room for a replica"):
        await take_caches(nodes, "s", [4], KV_TOKENS)
    assert await replicated_blocks(nodes) == []


async def test_replicas_are_freed_for_a_block_and_its_caches(nodes: InProcessCluster) -> None:
    await prepare(nodes, ONE, 1)
    await take_caches(nodes, "s", [4, 5], KV_TOKENS)
    assert await replicated_blocks(nodes) == [4, 5]
    await prepare(nodes, TWO, 2)
    for number in range(4):  # all the memory that is reserved for both blocks
        await take_caches(nodes, f"real-{number}", [2, 3], KV_TOKENS // 4)
    assert await replicated_blocks(nodes) == []
    assert (await nodes.state("plain")).sessions == 4


async def test_a_replica_becomes_the_cache_when_its_block_moves_to_the_node(nodes: InProcessCluster) -> None:
    await prepare(nodes, ONE, 1)
    await take_caches(nodes, "s", [3], KV_TOKENS)
    assert await replicated_blocks(nodes) == [3]
    await prepare(nodes, TWO, 2)
    assert await replicated_blocks(nodes) == []
    assert await nodes.permit("plain", "s", attempt=1) == {3: 4}


async def test_caches_of_a_replaced_epoch_stay_as_replicas(nodes: InProcessCluster) -> None:
    await prepare(nodes, TWO, 1)
    await commit(nodes, 1)
    await take_caches(nodes, "s", [3], KV_TOKENS)
    body = nodes.prepare_body("plain", ONE, 2) | {"replace_current": True}
    await nodes.command("plain", "prepare", body, 2)
    assert await replicated_blocks(nodes) == [3]
    assert await nodes.permit("plain", "s", attempt=1) == {3: 4}
    await nodes.peer("plain").close_sessions(["s"])
    assert await replicated_blocks(nodes) == []


async def test_blocks_share_a_part_and_each_gets_its_own_values(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Any] = []
    take = Executor.take_cache
    monkeypatch.setattr(Executor, "take_cache", lambda self, *part: engines.append(self.engine) or take(self, *part))
    await prepare(nodes, ONE, 1)
    await nodes.permit("plain", "s", capacity=KV_TOKENS, senders={3: CONTROLLER, 4: CONTROLLER})
    caches = [Activation("float32", (2, 2, 4, 16), bytes([number]) * 1024) for number in (1, 2)]
    await nodes.peer("plain").cache([OutgoingPart("s", 0, (3, 4), 0, caches)])
    assert [engines[0].export_cache("s", block, 0, 4) for block in (3, 4)] == caches


async def test_nothing_is_stored_of_a_part_with_one_block_that_its_sender_may_not_send(nodes: InProcessCluster) -> None:
    await prepare(nodes, ONE, 1)
    await nodes.permit("plain", "s", capacity=KV_TOKENS, senders={3: CONTROLLER})
    caches = [Activation("float32", (2, 2, 4, 16), bytes(1024))] * 2
    with pytest.raises(CapacityError, match="may not send the cache of block 4"):
        await nodes.peer("plain").cache([OutgoingPart("s", 0, (3, 4), 0, caches)])
    assert await replicated_blocks(nodes) == []


async def test_background_parts_grow_on_a_fast_link_and_shrink_on_a_slow_one(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    async with in_process(two_node_config(), stored_model, tmp_path) as nodes:
        await prepare(nodes, ONE, 1)
        await nodes.permit("plain", "s", capacity=1024, senders={3: CONTROLLER})
        peer = nodes.peer("plain")
        smallest = peer.background_bytes

        def part() -> OutgoingPart:
            positions = peer.background_bytes // 256
            values = Activation("float32", (2, 2, positions, 16), bytes(256 * positions))
            return OutgoingPart("s", 0, (3,), 0, [values])

        for _ in range(100):
            await peer.cache_in_background([part()])
            if peer.background_bytes >= 2 * smallest:
                break
        assert 2 * smallest <= peer.background_bytes <= CHUNK_BYTES
        peer.link.shape = Shape(0.001, 4e6)
        await peer.cache_in_background([part()])
        assert peer.background_bytes == smallest
