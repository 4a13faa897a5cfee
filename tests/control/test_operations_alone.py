"""Operations without nodes or a planner: what is done in which order, and what a failure undoes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resplit.config import ClusterFile
from resplit.control import operations as operations_module
from resplit.control.desired_state import load_desired_state
from resplit.control.operations import Operator, addresses_of
from resplit.epochs import Proposal
from resplit.errors import (
    CapacityError,
    ConfigError,
    DataError,
    InfeasibleError,
    NodeLostError,
    ProposalRefusedError,
    ResplitError,
)
from resplit.model.source import StoredModel
from resplit.wire.addresses import Address
from resplit.wire.routes import Route
from tests.support.recording_control import RecordedDeployment, RecordingPlanner
from tests.support.three_nodes import SPREAD, A, B, C

D = "delta"
WITHOUT_C = (A, A, B, B, B, B, B, A)
PORTS = {A: 1001, B: 1002, C: 1003, D: 1004}
FOLLOWED = ["trust is sent", "leave", "forget", "connect", "recover"]


def content(*nodes: str, **more: object) -> ClusterFile:
    """A cluster file of these nodes, by default of three."""
    entries = [{"name": name, "memory": "8 MiB", "address": f"127.0.0.1:{PORTS[name]}"} for name in nodes or (A, B, C)]
    classes = [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}]
    file: dict[str, Any] = {"name": "test", "source": A, "trusted": [A, B], "nodes": entries, "classes": classes}
    return ClusterFile({**file, "kv_tokens": 256, **more})


class Bench(RecordedDeployment):
    """An operator of a cluster that serves; nodes, gateway, planner, network and recovery are stand-ins."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.planner = RecordingPlanner(WITHOUT_C)
        self.unanswered: list[str] = []  # nodes that do not answer that they know whether they are trusted
        self.recovers = asyncio.Event()
        self.recovers.set()
        self.known = {A, B, C, D}  # nodes with keys
        self.waited_for: list[tuple[set[str], float]] = []
        self.profiled: list[Collection[str] | None] = []
        self.network_error: ResplitError | None = None
        self.file = folder / "desired_state.json"
        controller: Any = SimpleNamespace(
            view=self.view,
            planner=self.planner,
            deployment=self.deployment,
            recover=self._recover,
            membership=SimpleNamespace(send_trust=self._send_trust, introduce=self._introduce, profile=self._profile),
            member=SimpleNamespace(public_wrap_key=self._public_wrap_key),
        )
        network: Any = SimpleNamespace(connect=self._connect, forget=self._forget, wait_for=self._wait_for)
        self.operator = Operator(controller, network, content(), self.file)

    async def start(self, placement: Collection[str] = SPREAD) -> None:
        await self.deployment.deploy(Proposal(tuple(placement), "initial", 0))
        self.gateway.oldest = 10**6
        self.events.clear()

    @property
    def saved(self) -> object:
        return load_desired_state(self.file, content())

    def done(self) -> list[str]:
        """What happened beside commands about epochs, one word or two for each."""
        words = (*FOLLOWED, "activate", "introduce")
        return [
            next(word for word in words if event.startswith(word)) for event in self.events if event.startswith(words)
        ]

    def _recover(self) -> asyncio.Task[bool]:
        self.events.append("recover")
        return asyncio.create_task(self.recovers.wait())

    async def _send_trust(self) -> list[str]:
        self.events.append(f"trust is sent with drained {sorted(self.view.rules.drained)}")
        return self.unanswered

    async def _introduce(self) -> None:
        self.events.append("introduce")

    async def _profile(self, nodes: Collection[str] | None = None) -> None:
        self.profiled.append(nodes)
        if self.network_error:
            raise self.network_error

    def _public_wrap_key(self, name: str) -> bytes:
        if name not in self.known:
            raise ConfigError(name, "has no keys")
        return b""

    def _connect(self, addresses: Mapping[str, Address]) -> None:
        self.events.append(f"connect {', '.join(f'{name} {address}' for name, address in addresses.items())}")

    def _forget(self, names: set[str]) -> None:
        self.events.append(f"forget {', '.join(sorted(names))}")

    async def _wait_for(self, nodes: set[str], timeout_s: float) -> None:
        self.waited_for.append((nodes, timeout_s))
        if self.network_error:
            raise self.network_error


@pytest.fixture
async def bench(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(stored_model, tmp_path)
    yield bench
    await bench.tasks.stop()


async def test_a_drain_changes_the_rules_then_the_placement_then_the_streams(bench: Bench) -> None:
    await bench.start()
    assert await bench.operator.drain(C) == ["gamma is drained"]
    assert bench.done() == ["trust is sent", "activate", "leave", "forget", "connect", "recover"]
    assert "trust is sent with drained ['gamma']" in bench.events
    assert "leave gamma" in bench.events
    assert (bench.planner.asked, bench.planner.actions) == ([(tuple(SPREAD), 1)], ["drain"])
    assert bench.planner.avoided == [frozenset()]
    assert bench.deployment.history[-1].placement == WITHOUT_C
    assert bench.operator.desired.drained == {C}
    assert bench.saved == bench.operator.desired


async def test_a_drain_of_an_unused_node_moves_nothing(bench: Bench) -> None:
    await bench.start(WITHOUT_C)
    assert await bench.operator.drain(C) == ["gamma is drained"]
    assert bench.done() == FOLLOWED
    assert bench.planner.asked == []


async def test_before_the_first_epoch_nothing_is_planned(bench: Bench) -> None:
    await bench.operator.drain(C)
    await bench.operator.join(C)
    assert bench.planner.asked == []


@pytest.mark.parametrize("error", [InfeasibleError("too little memory"), DataError("no problem yet")])
async def test_a_drain_without_a_plan_is_undone(bench: Bench, error: ResplitError) -> None:
    await bench.start()
    before, bench.planner.error = bench.operator.desired, error
    with pytest.raises(ProposalRefusedError, match=str(error)):
        await bench.operator.drain(C)
    assert bench.operator.desired is before
    assert bench.view.rules.drained == frozenset()
    assert bench.view.addresses == addresses_of(before)
    assert [event for event in bench.events if event.startswith("trust")] == [
        "trust is sent with drained ['gamma']",
        "trust is sent with drained []",
    ]
    assert not bench.file.exists()
    assert bench.done() == ["trust is sent", "trust is sent"]


async def test_a_plan_avoids_all_nodes_that_have_refused(bench: Bench) -> None:
    await bench.start()
    bench.planner.first = [(A,) * 8, (B,) * 8, (A,) * 8]
    for node in (A, B):
        bench.commands.answers["prepare", node] = CapacityError("the disk is full")
    with pytest.raises(ProposalRefusedError, match="the disk is full"):
        await bench.operator.drain(C)
    assert bench.planner.avoided == [frozenset(), {A}, {A, B}]


async def test_a_plan_is_not_tried_again_if_no_other_node_refuses(bench: Bench) -> None:
    await bench.start()
    bench.planner.first = [(A,) * 8] * 3
    bench.commands.answers["prepare", A] = CapacityError("the disk is full")
    with pytest.raises(ProposalRefusedError, match="the disk is full"):
        await bench.operator.drain(C)
    assert bench.planner.avoided == [frozenset(), {A}]


async def test_a_node_that_is_not_trusted_any_more_loses_its_blocks_after_the_rule_is_saved(bench: Bench) -> None:
    await bench.start([A, B, B, C, C, C, B, A])
    bench.planner.placement = (A, A, B, C, C, C, B, A)
    saved_at_activation, activate = [], bench.gateway.activate

    def note_saved(route: Route) -> None:
        saved_at_activation.append(bench.saved == bench.operator.desired)
        activate(route)

    bench.gateway.activate = note_saved  # type: ignore[method-assign]
    assert await bench.operator.trust(B, False) == ["beta is not trusted any more"]
    assert bench.done() == ["activate", "leave", "trust is sent", "recover", "forget", "connect"]
    assert saved_at_activation == [True]
    assert bench.planner.actions == ["obey"]
    assert bench.commands.limits_s == [{B: 10.0}]
    assert bench.view.cluster.trusted == (A,)
    assert bench.deployment.broken is None


async def test_a_privacy_rule_that_no_placement_keeps_ends_service_with_the_reason(bench: Bench) -> None:
    await bench.start()
    bench.planner.error = InfeasibleError("no trusted node is left")
    bench.recovers.clear()  # it is not waited for
    bench.unanswered = [A]
    bench.gateway.connected = {A, C}
    assert await bench.operator.trust(A, False) == [
        "alpha is not trusted any more",
        "alpha does not answer; it drops its private blocks as soon as it answers",
    ]
    assert bench.deployment.broken == "no trusted node is left"
    assert bench.done() == ["leave", "trust is sent", "recover", "forget", "connect"]
    assert bench.saved == bench.operator.desired
    bench.recovers.set()


async def test_an_untrusted_node_that_is_away_is_named(bench: Bench) -> None:
    await bench.start((A,) * 8)
    bench.gateway.connected = {A, C}
    assert await bench.operator.trust(B, False) == [
        "beta is not trusted any more",
        "beta does not answer; it drops its private blocks as soon as it answers",
    ]


async def test_more_private_layers_are_a_privacy_rule_and_fewer_are_not(bench: Bench) -> None:
    await bench.start((A,) * 8)
    await bench.operator.apply(content(private_layers=2))
    assert bench.done() == ["leave", "trust is sent", "recover", "forget", "connect"]
    bench.events.clear()
    await bench.operator.apply(content(private_layers=1))
    assert bench.done() == FOLLOWED


async def test_the_last_trusted_node_is_not_drained(bench: Bench) -> None:
    await bench.start((A,) * 8)
    await bench.operator.drain(B)
    bench.events.clear()
    with pytest.raises(ProposalRefusedError, match="alpha is the last trusted node"):
        await bench.operator.drain(A)
    assert bench.events == []


async def test_streams_that_do_not_leave_in_time_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "_SETTLE_TIMEOUT_S", 0.01)
    await bench.start()
    bench.gateway.oldest = 1
    told = "streams had not left earlier placements within 0 s, and are replayed"
    async with asyncio.timeout(30):
        assert await bench.operator.drain(C) == ["gamma is drained", told]
    assert "leave gamma" in bench.events


async def test_a_recovery_that_does_not_end_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "_RECOVERS_WITHIN_S", 0.01)
    await bench.start()
    bench.recovers.clear()
    async with asyncio.timeout(30):
        told = await bench.operator.drain(C)
    assert told == ["gamma is drained", "no placement can be prepared yet; requests wait for one"]
    bench.recovers.set()


async def test_what_is_so_already_changes_nothing(bench: Bench) -> None:
    await bench.start()
    assert await bench.operator.trust(A, True) == []
    assert await bench.operator.join(A) == []
    assert (bench.events, bench.planner.asked) == ([], [])


async def test_a_node_that_joins_gets_the_blocks_that_a_plan_places_on_it(bench: Bench) -> None:
    await bench.start(WITHOUT_C)
    await bench.operator.drain(C)
    bench.planner.placement = tuple(SPREAD)
    assert await bench.operator.join(C) == ["gamma is used again"]
    assert bench.planner.asked == [(WITHOUT_C, 1)]
    assert (bench.deployment.history[-1].action, bench.deployment.history[-1].placement) == ("join", tuple(SPREAD))


@pytest.mark.parametrize(
    "error",
    [InfeasibleError("too little memory"), DataError("no problem yet"), ProposalRefusedError("the disk is full")],
)
async def test_a_node_joins_although_no_plan_can_use_it_now(bench: Bench, error: ResplitError) -> None:
    await bench.start(WITHOUT_C)
    await bench.operator.drain(C)
    bench.planner.error = error
    assert await bench.operator.join(C) == ["gamma is used again"]
    assert bench.deployment.live_number == 1


async def test_a_join_that_a_plan_does_not_use_moves_nothing(bench: Bench) -> None:
    await bench.start(WITHOUT_C)
    await bench.operator.drain(C)
    bench.planner.placement = (A,) * 8
    await bench.operator.join(C)
    assert (len(bench.planner.asked), bench.deployment.live_number) == (1, 1)


async def test_an_operation_interrupts_a_proposal_that_gives_way(bench: Bench) -> None:
    await bench.start()
    answering = asyncio.Event()
    send = bench.commands.send

    async def hang(commands: Any, epoch: int, within_s: Any = None) -> Any:
        answers = await send(commands, epoch, within_s)
        if epoch == 2 and any(command.kind == "prepare" for command in commands.values()):
            await answering.wait()
        return answers

    bench.commands.send = hang  # type: ignore[method-assign]
    proposal = Proposal(WITHOUT_C, "re-split", 1)
    deploying = asyncio.create_task(bench.deployment.deploy(proposal, gives_way=True))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(30):
        await bench.operator.apply(content(private_layers=2))
    with pytest.raises(ProposalRefusedError, match="a change that could not wait"):
        await deploying


async def test_an_added_node_is_waited_for_introduced_and_timed(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected |= {D}
    assert await bench.operator.apply(content(A, B, C, D)) == ["delta is added"]
    assert bench.waited_for == [({D}, 10.0)]
    assert bench.profiled == [{D}]
    assert bench.done() == [*FOLLOWED, "introduce"]
    assert bench.view.addresses == {name: Address("127.0.0.1", port) for name, port in PORTS.items()}


async def test_an_added_node_that_does_not_answer_is_named_and_others_that_are_away_are_not(bench: Bench) -> None:
    await bench.start((A,) * 8)
    bench.network_error = NodeLostError("delta does not answer")
    bench.gateway.connected = {A, B}
    told = "delta does not answer yet; profile once it does (`python -m flows.profile`)"
    assert await bench.operator.apply(content(A, B, C, D)) == ["delta is added", told]
    assert bench.profiled == [{D}]


async def test_a_change_without_a_new_node_introduces_none(bench: Bench) -> None:
    await bench.start()
    await bench.operator.drain(C)
    assert (bench.waited_for, bench.profiled) == ([], [])
    assert "introduce" not in bench.events


async def test_a_node_without_keys_or_address_is_refused_before_anything_changes(bench: Bench) -> None:
    await bench.start()
    bench.known.discard(D)
    with pytest.raises(ConfigError, match="delta: has no keys"):
        await bench.operator.apply(content(A, B, C, D))
    bench.known.add(D)
    whole = content(A, B, C, D)
    nodes = [{key: value for key, value in node.items() if key != "address"} for node in whole["nodes"]]
    with pytest.raises(ConfigError, match="nodes: delta: has no address"):
        await bench.operator.apply({**whole, "nodes": nodes})
    assert bench.events == []
    assert addresses_of(bench.operator.desired) == bench.view.addresses


async def test_a_removed_node_is_reached_until_its_blocks_have_left(bench: Bench) -> None:
    await bench.start()
    assert await bench.operator.apply(content(A, B)) == ["gamma is removed"]
    assert f"prepare {C} 2 (proposed)" in bench.events
    assert {"leave gamma", "forget gamma", f"connect {A} 127.0.0.1:1001, {B} 127.0.0.1:1002"} <= set(bench.events)
    assert list(bench.view.addresses) == [A, B]


async def test_a_node_with_a_new_address_is_drained_at_the_old_one_first(bench: Bench) -> None:
    await bench.start()
    moved = content()
    nodes = [node | ({"address": "127.0.0.1:9999"} if node["name"] == C else {}) for node in moved["nodes"]]
    assert await bench.operator.apply({**moved, "nodes": nodes}) == ["gamma is at 127.0.0.1:9999"]
    assert [event for event in bench.events if event.startswith("trust")] == ["trust is sent with drained ['gamma']"]
    assert bench.deployment.history[-1].placement == WITHOUT_C
    assert bench.deployment.live is not None
    assert bench.deployment.live.addresses[C] == Address("127.0.0.1", 1003)
    assert bench.view.addresses[C] == Address("127.0.0.1", 9999)
    assert bench.view.rules.drained == frozenset()
    assert "forget " in bench.events
    assert bench.planner.actions == ["drain"]
