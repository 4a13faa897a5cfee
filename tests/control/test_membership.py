"""What a node is told when it is introduced, comes back, is timed, trusted, drained or emulated, and what failures do.

Commands are recorded instead of sent. `test_controller.py` and `test_operations.py` send them to real nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.membership import Membership
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import (
    CapacityError,
    CommandRefusedError,
    ConfigError,
    NodeLostError,
    ProposalRefusedError,
    ResplitError,
)
from resplit.types import BlockFeatures
from resplit.wire.addresses import Address
from resplit.wire.commands import Emulate
from resplit.wire.emulated_link import Shape
from tests.support.three_nodes import A, B, C, three_node_config

FEATURES = tuple(BlockFeatures(f"layer.{i}", "layer", 1, 1, 1, 500, 10, 1, i == 0, 0) for i in range(3))
MODEL = SimpleNamespace(features=lambda private_layers: FEATURES)
LIVE = LiveEpoch(7, 0.0, "initial", (A, B, A), None, None, 0.0, 0.0)


class Cluster:
    """Membership of three nodes. `sent` are the commands, each with the way in which it was sent and its epoch."""

    def __init__(self, connected: Sequence[str] = (A, B, C), drained: frozenset[str] = frozenset()) -> None:
        self.sent: list[tuple[str, dict[str, Any], int]] = []
        self.events: list[Any] = []
        self.answers: dict[str, BaseException] = {}
        self.held: dict[str, list[str]] = {}  # sessions, by node
        self.up_to_date = True
        self.refusal: ResplitError | None = None
        gateway = SimpleNamespace(
            connected_nodes=lambda: frozenset(connected),
            session_names=lambda: ["s1"],
            reconfigure=lambda *changed: None,
            welcome=lambda name: self.events.append(("welcome", name)),
        )
        addresses = {name: Address("127.0.0.1", port) for port, name in enumerate((A, B, C), 1)}
        self.view = ClusterView(three_node_config(), cast(Any, MODEL), addresses, cast(Any, gateway))
        self.view.adopt(self.view.cluster, drained, addresses)
        deployment: Any = SimpleNamespace(live_number=7, live=LIVE, broken=None)
        deployment.abort_unfinished = self._noting("abort unfinished")
        deployment.tell = self._tell
        deployment.resync = self._resync
        deployment.deploy = self._deploy
        recovery = SimpleNamespace(resume=self._noting("resume"), recover=self._noting("recover"))
        self.peers: Any = {name: SimpleNamespace(close_sessions=self._noting_of(name)) for name in (A, B, C)}
        self.membership = Membership(self.view, cast(Any, self), deployment, cast(Any, recovery), self.peers)

    def peer(self, name: str) -> Any:
        return self.peers[name]

    # The commands are named, not built.
    def connect(self, name: str, addresses: Mapping[str, Address], rules: object) -> Any:
        assert (set(addresses), rules) == ({A, B, C}, self.view.rules)
        return "connect", name

    def profile(self, name: str, rules: object) -> Any:
        return "profile", name, rules is self.view.rules

    def trust(self, name: str, rules: object) -> Any:
        return "trust", name, rules is self.view.rules

    def standby(self, name: str, blocks: Sequence[int], rules: object) -> Any:
        return "standby", name, *blocks, rules is self.view.rules

    async def send(self, commands: dict[str, Any], epoch: int) -> dict[str, Any]:
        self.sent.append(("send", commands, epoch))
        return {name: self.answers.get(name, {}) for name in commands}

    async def require(self, commands: dict[str, Any], epoch: int) -> dict[str, Any]:
        self.sent.append(("require", commands, epoch))
        for name in commands:
            if name in self.answers:
                raise self.answers[name]
        return self._replies(commands)

    async def notify(self, commands: dict[str, Any], epoch: int) -> dict[str, Any]:
        self.sent.append(("notify", commands, epoch))
        return self._replies(commands)

    def _replies(self, commands: dict[str, Any]) -> dict[str, Any]:
        return {name: {"sessions": self.held.get(name, [])} for name in commands}

    def fault(self, node: str, reason: str) -> None:
        self.events.append(("fault", node, reason))

    def _noting(self, event: str) -> Any:
        async def note() -> None:
            self.events.append(event)

        return note

    def _noting_of(self, node: str) -> Any:
        async def note(sessions: list[str]) -> None:
            self.events.append(("close", node, *sessions))

        return note

    async def _tell(self, commands: dict[str, Any], epoch: int) -> list[str]:
        self.sent.append(("tell", commands, epoch))
        return [name for name in commands if name in self.answers]

    async def _resync(self, name: str, peer: object) -> bool:
        self.events.append(("resync", name, peer))
        return self.up_to_date

    async def _deploy(self, proposal: Proposal) -> None:
        self.events.append(proposal)
        if self.refusal:
            raise self.refusal


async def test_only_nodes_that_answer_are_introduced_after_an_unfinished_epoch_was_aborted() -> None:
    cluster = Cluster(connected=(C, A))
    assert not cluster.membership.introduced
    await cluster.membership.introduce()
    assert cluster.membership.introduced
    assert cluster.events == ["abort unfinished"]
    assert cluster.sent == [("notify", {A: ("connect", A), C: ("connect", C)}, 7)]


async def test_a_node_that_comes_back_up_to_date_is_connected_and_nothing_is_deployed() -> None:
    cluster = Cluster()
    await cluster.membership.welcome(B)
    assert cluster.sent == [("require", {B: ("connect", B)}, 7)]
    assert cluster.events == [("resync", B, cluster.peers[B]), ("welcome", B), "resume", "recover"]


async def test_nodes_free_what_they_hold_of_sessions_that_do_not_run() -> None:
    cluster = Cluster()
    cluster.held = {A: ["s3", "s1", "s2"], B: ["s1"]}
    await cluster.membership.introduce()
    await cluster.membership.welcome(A)
    closed = ("close", A, "s2", "s3")
    assert [event for event in cluster.events if event[0] == "close"] == [closed, closed]


@pytest.mark.parametrize("refusal", [None, ProposalRefusedError("not now"), CapacityError("the disk is full")])
async def test_a_node_that_comes_back_without_its_blocks_gets_the_live_placement_again_or_a_recovery_begins(
    refusal: ResplitError | None,
) -> None:
    cluster = Cluster()
    cluster.up_to_date, cluster.refusal = False, refusal
    await cluster.membership.welcome(B)
    assert cluster.events[1:] == [("welcome", B), "resume", Proposal(LIVE.placement, RECOVER, 7), "recover"]
    broken = cast(Any, cluster.membership)._deployment.broken
    assert broken == (f"{B} has lost its blocks: {refusal}" if refusal else None)


async def test_before_the_first_epoch_nothing_is_deployed_for_a_node_that_comes_back() -> None:
    cluster = Cluster()
    cluster.up_to_date = False
    cast(Any, cluster.membership)._deployment.live = None
    await cluster.membership.welcome(B)
    assert cluster.events[1:] == [("welcome", B), "resume", "recover"]


async def test_a_node_that_is_lost_again_is_not_welcome_and_faulty_only_if_it_answered() -> None:
    cluster = Cluster()
    cluster.answers = {A: NodeLostError("alpha is gone"), B: CommandRefusedError("privacy", "no")}
    with structlog.testing.capture_logs() as logged:
        await cluster.membership.welcome(A)
        await cluster.membership.welcome(B)
    assert cluster.events == [("fault", B, "it cannot be connected: command refused (privacy): no")]
    assert [(entry["node"], entry["error"]) for entry in logged] == [
        (A, "alpha is gone"),
        (B, "command refused (privacy): no"),
    ]
    cluster.answers = {A: KeyError("defect")}
    with pytest.raises(KeyError):
        await cluster.membership.welcome(A)


async def test_nodes_are_timed_that_answer_are_wanted_and_not_drained() -> None:
    cluster = Cluster(connected=(A, B), drained=frozenset({B}))
    await cluster.membership.profile()
    await cluster.membership.profile({A, C})
    await cluster.membership.profile({B})
    every = {A: ("profile", A, True)}
    assert cluster.sent == [("send", every, 7), ("send", every, 7), ("send", {}, 7)]


async def test_the_timings_of_some_nodes_are_enough_but_not_those_of_none() -> None:
    cluster = Cluster()
    cluster.answers = {A: NodeLostError("alpha is gone"), B: ResplitError("no disk")}
    with structlog.testing.capture_logs() as logged:
        await cluster.membership.profile()
    assert [(entry["node"], entry["error"]) for entry in logged] == [(A, "alpha is gone"), (B, "no disk")]
    with pytest.raises(NodeLostError, match="alpha"):
        await cluster.membership.profile({A, B})
    cluster.answers = {A: KeyError("defect")}
    with pytest.raises(KeyError):
        await cluster.membership.profile()


async def test_each_node_that_answers_is_told_its_trust_and_a_drained_one_first_to_keep_nothing_ready() -> None:
    cluster = Cluster(connected=(A, B), drained=frozenset({B, C}))
    cluster.answers = {B: NodeLostError("slow")}
    assert await cluster.membership.send_trust() == [B]
    assert cluster.sent == [
        ("tell", {B: ("standby", B, True)}, 7),
        ("tell", {A: ("trust", A, True), B: ("trust", B, True)}, 7),
    ]


async def test_an_emulation_is_sent_to_its_node_only_if_all_nodes_in_it_exist() -> None:
    cluster = Cluster()
    change = Emulate(links={B: Shape(0.1, 1e6)})
    await cluster.membership.emulate(A, change)
    assert cluster.sent == [("require", {A: change}, 7)]
    for node, wrong, words in [
        ("attic", change, f"'attic': not in this cluster; it has {A}, {B}, {C}"),
        (A, Emulate(links={"attic": Shape(0.1, 1e6)}), f"'attic': not in this cluster; it has {A}, {B}, {C}"),
        (B, change, f"'{B}': a link is between two nodes"),
    ]:
        with pytest.raises(ConfigError) as error:
            await cluster.membership.emulate(node, wrong)
        assert str(error.value) == words
    assert len(cluster.sent) == 1


async def test_a_killed_node_need_not_answer_but_may_refuse() -> None:
    cluster = Cluster()
    cluster.answers = {A: NodeLostError("gone"), B: CommandRefusedError("kind", "real hardware")}
    await cluster.membership.kill(A)
    assert cluster.sent == [("require", {A: Emulate(kill=True)}, 7)]
    with pytest.raises(CommandRefusedError):
        await cluster.membership.kill(B)
    with pytest.raises(ConfigError, match="attic"):
        await cluster.membership.kill("attic")
