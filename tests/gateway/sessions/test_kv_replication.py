"""Replicas are on allowed nodes, within the free memory, and are extended every few positions."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from resplit.config import ClusterConfig
from resplit.gateway.sessions.context import SessionContext
from resplit.gateway.sessions.kv_replication import KvReplication, choose_stand_bys
from resplit.gateway.sessions.permits import SessionPermits
from resplit.gateway.sessions.router import Router
from resplit.types import BlockFeatures
from resplit.wire.node_pb2 import TransferReply
from resplit.wire.routes import Route
from tests.support.recording_peer import RecordingPeer

NODES = ("alpha", "beta", "gamma", "delta")
BLOCKS = 6
CACHED = range(1, BLOCKS - 1)

placements = st.lists(st.sampled_from(NODES), min_size=BLOCKS, max_size=BLOCKS)


def cluster(memory: dict[str, str], trusted: tuple[str, ...] = ("alpha", "beta")) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alpha",
            "trusted": list(trusted),
            "nodes": [{"name": name, "memory": memory.get(name, "10 KiB")} for name in NODES],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "kv_tokens": 10,
            "limits": {"copy_every": 4},
        }
    )


def features() -> tuple[BlockFeatures, ...]:
    """A chain of blocks of 500 bytes whose first layer is private. A cached token takes 10 bytes in each layer."""
    kinds = ["embed", *["layer"] * (BLOCKS - 2), "head"]
    return tuple(
        BlockFeatures(f"{kind}.{i}", kind, 1, 1, 1, 500, 10 if kind == "layer" else 0, 1, i < 2, 0)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    )


@given(placements, st.sets(st.sampled_from(NODES)), st.dictionaries(st.sampled_from(CACHED), st.sampled_from(NODES)))
def test_a_replica_is_neither_on_the_host_of_its_block_nor_on_a_forbidden_node(
    placement: list[str], connected: set[str], current: dict[int, str]
) -> None:
    chosen = choose_stand_bys(cluster({}), features(), placement, connected, current)
    assert all(chosen[block] in connected - {placement[block]} for block in chosen)
    assert chosen.get(1, "alpha") in ("alpha", "beta")
    for block in set(chosen) & set(current):  # a replica that is allowed does not move
        allowed = current[block] in connected - {placement[block]} and (
            block != 1 or current[block] in ("alpha", "beta")
        )
        assert not allowed or chosen[block] == current[block]


def test_replicas_take_only_room_that_is_not_reserved() -> None:
    placement = ["alpha", "alpha", "beta", "beta", "beta", "alpha"]
    # Beta needs 1800 bytes for its own blocks. Gamma, without blocks, has room for two replicas, delta for none.
    small = cluster({"alpha": "1600 B", "beta": "1899 B", "gamma": "200 B", "delta": "99 B"})
    assert choose_stand_bys(small, features(), placement, NODES, {}) == {2: "gamma", 3: "gamma"}


def test_neighbouring_blocks_are_replicated_together_on_the_node_with_most_room() -> None:
    placement = ["alpha", "alpha", "beta", "beta", "alpha", "alpha"]
    chosen = choose_stand_bys(cluster({"delta": "20 KiB", "beta": "15 KiB"}), features(), placement, NODES, {})
    assert chosen == {1: "beta", 2: "delta", 3: "delta", 4: "delta"}


ROUTE = Route(1, ("alpha", "alpha", "alpha", "beta", "beta", "alpha"), {})  # layers 1 and 2 on alpha, 3 and 4 on beta


def replication(**peers: RecordingPeer) -> KvReplication:
    """Of session "s" under `ROUTE`, with a copy every four positions; only delta has room besides the hosts."""
    config = cluster({"delta": "20 KiB", "gamma": "1 B"})
    router = Router(config, cast(Any, None), listening=set(NODES))
    context = SessionContext(config, features(), router, cast(Any, None), cast(Any, None))
    everybody = {name: RecordingPeer() for name in NODES} | peers
    return KvReplication(SessionPermits("s", 64, cast(Any, everybody)), context)


def ranges(peer: RecordingPeer) -> list[tuple[int, int]]:
    return [(request.first, request.last) for request in peer.requests]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_copy_begins_once_enough_positions_were_added() -> None:
    alpha, beta = RecordingPeer(), RecordingPeer()
    replicas = replication(alpha=alpha, beta=beta)
    for position in (3, 4, 7, 8):
        replicas.advance(ROUTE, position, may_begin=True)
        await settle()
    assert ranges(alpha) == ranges(beta) == [(0, 4), (4, 8)]
    # Block 1 is private, so delta may not store it.
    assert list(alpha.requests[0].target) == ["", "beta", "beta", "", "", ""]
    assert list(beta.requests[0].target) == ["", "", "", "delta", "delta", ""]
    assert replicas.sent_bytes == 400


async def test_no_copy_begins_during_a_move_or_another_copy() -> None:
    alpha, beta = RecordingPeer(), RecordingPeer()
    replicas = replication(alpha=alpha, beta=beta)
    replicas.advance(ROUTE, 4, may_begin=False)
    await settle()
    assert ranges(beta) == []
    beta.transferring.clear()
    for position in (5, 9, 14):
        replicas.advance(ROUTE, position, may_begin=True)
        await settle()
    assert ranges(beta) == [(0, 5)]
    assert replicas.max_lag == 14 - 5
    beta.transferring.set()
    await settle()
    replicas.advance(ROUTE, 15, may_begin=True)
    await settle()
    assert ranges(beta) == [(0, 5), (5, 15)]


async def test_a_node_that_refuses_a_replica_is_not_chosen_again_before_the_route_changes() -> None:
    alpha, beta = RecordingPeer(), RecordingPeer(TransferReply(error="no room"))
    replicas = replication(alpha=alpha, beta=beta)
    for position in (4, 8):
        replicas.advance(ROUTE, position, may_begin=True)
        await settle()
    replicas.stop()
    replicas.advance(ROUTE, 8, may_begin=True)
    await settle()
    assert [(request.target[3], request.first, request.last) for request in beta.requests] == [
        ("delta", 0, 4),
        ("alpha", 0, 8),
        ("delta", 0, 8),
    ]


async def test_a_node_that_was_lost_gets_a_whole_copy_at_once_and_may_have_refused_before() -> None:
    alpha, beta = RecordingPeer(), RecordingPeer(TransferReply(error="the connection to delta broke"))
    replicas = replication(alpha=alpha, beta=beta)
    replicas.advance(ROUTE, 4, may_begin=True)
    await settle()
    beta.reply = TransferReply()
    replicas.forget("delta")
    replicas.advance(ROUTE, 5, may_begin=True)
    await settle()
    assert [(request.target[3], request.first, request.last) for request in beta.requests] == [
        ("delta", 0, 4),
        ("delta", 0, 5),
    ]
    assert ranges(alpha) == [(0, 4), (4, 5)]  # those on beta are extended


async def test_after_a_loss_copies_continue_from_the_replicas_that_nodes_hold() -> None:
    alpha, beta = RecordingPeer(), RecordingPeer()
    replicas = replication(alpha=alpha, beta=beta)
    held: dict[str, Any] = {"alpha": {1: 12, 2: 12}, "beta": {1: 7, 3: 12, 4: 12}, "delta": {2: 6, 3: 20, 4: 9}}
    replicas.adopt(held, ROUTE, 10)
    replicas.advance(ROUTE, 14, may_begin=True)
    await settle()
    # Block 3 continues at 10: positions after the restored ones belong to the attempt that was lost.
    assert sorted(ranges(beta)) == [(9, 14), (10, 14)]
    assert sorted(ranges(alpha)) == [(6, 14), (7, 14)]
