"""The transfers of caches for a move and after a loss, for any caches that nodes hold."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import NodeLostError
from resplit.gateway.sessions.kv_transfer import (
    CacheTransfer,
    another_round_pays,
    plan_move,
    plan_restore,
    transfer_caches,
)
from resplit.gateway.sessions.permits import SessionPermits
from resplit.types import BlockFeatures
from resplit.wire.node_pb2 import TransferReply
from resplit.wire.routes import Route
from tests.support.recording_peer import RecordingPeer

NODES = ("alpha", "beta", "gamma", "delta")
BLOCKS = 6
CACHED = range(1, BLOCKS - 1)

placements = st.lists(st.sampled_from(NODES), min_size=BLOCKS, max_size=BLOCKS)
lengths = st.dictionaries(st.sampled_from(CACHED), st.integers(0, 40))
helds = st.dictionaries(st.sampled_from(NODES), lengths)


@given(helds, placements, st.lists(st.integers(1, 12), max_size=12))
def test_every_whole_pass_is_restored_that_some_node_holds_for_each_block(
    held: dict[str, dict[int, int]], placement: list[str], steps: list[int]
) -> None:
    plan = plan_restore(held, placement, CACHED, steps)
    assert plan.positions == sum(steps[: plan.steps])
    best = [max((there.get(block, 0) for there in held.values()), default=0) for block in CACHED]
    assert plan.positions == max([0, *(end for end in accumulate(steps) if end <= min(best))])


@given(helds, placements, st.lists(st.integers(1, 12), max_size=12))
def test_after_all_transfers_each_host_has_the_restored_positions(
    held: dict[str, dict[int, int]], placement: list[str], steps: list[int]
) -> None:
    plan = plan_restore(held, placement, CACHED, steps)
    there = {block: held.get(placement[block], {}).get(block, 0) for block in CACHED}
    for transfer in plan.transfers:
        assert transfer.first == there[transfer.block]  # no gap, and no position twice
        assert held[transfer.source][transfer.block] >= transfer.last
        assert transfer.target == placement[transfer.block] != transfer.source
        there[transfer.block] = transfer.last
    assert all(length >= plan.positions for length in there.values())


def test_nothing_is_transferred_if_every_host_has_its_caches() -> None:
    held = {"alpha": {1: 9, 2: 9}, "beta": {3: 9, 4: 9}}
    plan = plan_restore(held, ["alpha"] * 3 + ["beta"] * 3, CACHED, [7, 1, 1])
    assert (plan.steps, plan.positions, plan.transfers) == (3, 9, ())


def test_a_move_transfers_every_cache_whose_node_changes() -> None:
    caches = (0, 10, 10, 10, 10, 0)
    chain = [BlockFeatures(f"b{i}", "layer", 1, 1, 1, 500, kv, 1, False, 0) for i, kv in enumerate(caches)]
    old = Route(1, ("alpha", "alpha", "alpha", "beta", "beta", "alpha"), {})
    new = Route(2, ("beta", "alpha", "gamma", "beta", "alpha", "beta"), {})
    assert plan_move(old, new, chain, 3, 8) == (
        CacheTransfer(2, "alpha", "gamma", 3, 8),
        CacheTransfer(4, "beta", "alpha", 3, 8),
    )


TRANSFERS = [
    CacheTransfer(1, "alpha", "gamma", 0, 8),
    CacheTransfer(2, "alpha", "beta", 0, 8),
    CacheTransfer(3, "alpha", "beta", 4, 8),
    CacheTransfer(4, "beta", "gamma", 0, 8),
]


def permits(peers: dict[str, RecordingPeer]) -> SessionPermits:
    """Of session "s" in its second new attempt."""
    permits = SessionPermits("s", 64, cast(Any, peers | {"gamma": RecordingPeer()}))
    permits.new_attempt()
    permits.new_attempt()
    return permits


async def test_each_source_gets_one_request_for_each_range_of_positions() -> None:
    peers = {"alpha": RecordingPeer(TransferReply(bytes=100)), "beta": RecordingPeer(TransferReply(bytes=30))}
    sent_bytes = await transfer_caches(permits(peers), TRANSFERS, BLOCKS, background=True)
    assert sent_bytes == 230
    assert [(r.first, r.last, list(r.target)) for r in peers["alpha"].requests] == [
        (0, 8, ["", "gamma", "beta", "", "", ""]),
        (4, 8, ["", "", "", "beta", "", ""]),
    ]
    assert [list(r.target) for r in peers["beta"].requests] == [["", "", "", "", "gamma", ""]]
    requests = [request for peer in peers.values() for request in peer.requests]
    assert {(r.session, r.attempt, r.background) for r in requests} == {("s", 2, True)}


async def test_a_transfer_that_fails_is_a_loss_with_its_reason() -> None:
    peers = {"alpha": RecordingPeer(TransferReply()), "beta": RecordingPeer(TransferReply(error="gamma has no room"))}
    with pytest.raises(NodeLostError, match="session s: gamma has no room"):
        await transfer_caches(permits(peers), TRANSFERS, BLOCKS)


@pytest.mark.parametrize(
    ("missing", "last_round", "pays"),
    [(3, 4, True), (2, 4, False), (3, 3, False), (100, 101, True), (0, 0, False)],
)
def test_a_move_copies_again_while_rounds_become_shorter_and_more_than_a_patch_is_missing(
    missing: int, last_round: int, pays: bool
) -> None:
    assert another_round_pays(missing, last_round) is pays
