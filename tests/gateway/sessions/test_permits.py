"""Which permits the gateway gives to nodes for one session, and when it takes them back."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from resplit.errors import NodeLostError
from resplit.gateway.sessions.permits import SessionPermits
from resplit.model.activation import token_ids
from resplit.wire.node_pb2 import Step
from resplit.wire.permits import Permit
from resplit.wire.routes import Route
from resplit.wire.tensors import to_wire
from tests.support.recording_peer import RecordingPeer

FIRST = Route(1, ("alpha", "beta", "beta"), {})
SECOND = Route(2, ("alpha", "gamma", "beta"), {})  # block 1 moves from beta to gamma


class Nodes:
    """Permits of one session that may cache 8 tokens, and the peers that record them."""

    def __init__(self) -> None:
        self.peers = {name: RecordingPeer() for name in ("alpha", "beta", "gamma", "delta")}
        self.permits = SessionPermits("s", 8, cast(Any, self.peers))

    def newest(self) -> dict[str, tuple[int, set[int], dict[int, str]]]:
        """Attempt, epochs and senders in the newest permit of each node that has one."""
        last = {name: peer.permits[-1] for name, peer in self.peers.items() if peer.permits}
        return {name: (each.attempt, set(each.epochs), dict(each.senders)) for name, each in last.items()}

    def calls(self) -> int:
        return sum(len(peer.permits) for peer in self.peers.values())


async def test_a_move_permits_both_routes_until_the_session_has_moved() -> None:
    nodes = Nodes()
    await nodes.permits.keep_only(FIRST)
    assert nodes.newest() == {"alpha": (0, {1}, {}), "beta": (0, {1}, {})}
    await nodes.permits.enter(SECOND)
    await nodes.permits.allow({"gamma": {1: "beta"}, "delta": {1: "beta", 2: "beta"}})
    assert nodes.newest() == {
        "alpha": (0, {1, 2}, {}),
        "beta": (0, {1, 2}, {}),
        "gamma": (0, {2}, {1: "beta"}),
        "delta": (0, set(), {1: "beta", 2: "beta"}),
    }
    await nodes.permits.keep_only(SECOND)
    assert nodes.newest() == {
        "alpha": (0, {2}, {}),
        "beta": (0, {2}, {}),
        "gamma": (0, {2}, {}),
        "delta": (0, set(), {2: "beta"}),  # beta hosts block 1 no longer
    }
    assert nodes.permits.nodes == set(nodes.peers)


async def test_the_first_step_brings_the_permits_of_its_route() -> None:
    nodes = Nodes()
    first = Step(session="s", epoch=1, values=to_wire(token_ids([1, 2])))
    others = nodes.permits.start(FIRST, first)
    assert others.keys() == {"beta"}
    for step in (first, others["beta"]):
        assert Permit.from_wire(step.permit) == Permit(0, 8, frozenset({1}))
    assert first.HasField("values")
    assert not others["beta"].HasField("values")
    await nodes.permits.keep_only(FIRST)
    assert nodes.calls() == 0
    assert nodes.permits.nodes == {"alpha", "beta"}


async def test_a_permit_that_a_node_has_is_not_sent_again_until_the_node_was_lost() -> None:
    nodes = Nodes()
    for _ in range(3):
        await nodes.permits.allow({"delta": {1: "beta"}})
    assert nodes.calls() == 1
    nodes.permits.forget("delta")
    await nodes.permits.allow({"delta": {1: "beta"}})
    assert nodes.calls() == 2


async def test_a_new_attempt_takes_back_all_that_was_permitted_before() -> None:
    nodes = Nodes()
    await nodes.permits.keep_only(FIRST)
    await nodes.permits.allow({"delta": {1: "beta"}})
    nodes.permits.new_attempt()
    await nodes.permits.begin(SECOND, nodes.peers)
    assert nodes.newest() == dict.fromkeys(SECOND.placement, (1, {2}, {})) | {"delta": (1, set(), {})}


async def test_a_cache_that_a_node_was_never_to_have_is_not_restored() -> None:
    nodes = Nodes()
    await nodes.permits.keep_only(FIRST)
    await nodes.permits.allow({"delta": {1: "beta"}})
    for peer in nodes.peers.values():
        peer.held = {0: 5, 1: 5, 2: 5}
    nodes.permits.new_attempt()
    held = await nodes.permits.begin(SECOND, nodes.peers)
    assert held == {"alpha": {0: 5}, "beta": {1: 5, 2: 5}, "gamma": {}, "delta": {1: 5}}


class SilentPeer:
    """A node that never answers within the time that it is given."""

    def __init__(self) -> None:
        self.given_s: list[float] = []

    async def permit(self, session: str, permit: Permit, keep: bool, timeout_s: float) -> dict[int, int]:
        self.given_s.append(timeout_s)
        await asyncio.sleep(0)
        raise NodeLostError("silent")


async def test_a_silent_node_matters_only_to_the_routes_that_need_it() -> None:
    nodes = Nodes()
    await nodes.permits.keep_only(FIRST)
    await nodes.permits.allow({"gamma": {2: "beta"}})
    silent = SilentPeer()
    nodes.peers["gamma"] = cast(Any, silent)
    nodes.permits.forget("gamma")
    await nodes.permits.keep_only(FIRST)
    nodes.permits.new_attempt()
    assert "gamma" not in await nodes.permits.begin(FIRST, nodes.peers)
    assert silent.given_s == [1.0]
    for needs in (nodes.permits.enter(SECOND), nodes.permits.keep_only(SECOND), nodes.permits.allow({"gamma": {}})):
        with pytest.raises(NodeLostError, match="silent"):
            await needs


async def test_a_node_that_has_left_the_cluster_is_lost() -> None:
    nodes = Nodes()
    del nodes.peers["beta"]
    with pytest.raises(NodeLostError, match="beta has left the cluster"):
        await nodes.permits.keep_only(FIRST)
