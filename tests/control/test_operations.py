"""Drain, join, trust and a changed file over real nodes on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resplit.cluster.local import free_ports
from resplit.control import operations as operations_module
from resplit.control.controller import Controller
from resplit.control.operations import Operator
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import ConfigError, NodeLostError, ProposalRefusedError
from resplit.types import Problem
from resplit.wire.addresses import Address
from tests.support.controllers import FIRST, LONG, operator_of, placed, served, started
from tests.support.in_process import InProcessCluster, deploy, until
from tests.support.latest_problem import problem_of
from tests.support.tcp_proxy import TcpProxy
from tests.support.three_nodes import A, B, C


async def test_a_drained_node_is_emptied_and_a_drain_that_is_impossible_changes_nothing(
    nodes: InProcessCluster, operator: Operator
) -> None:
    tokens = await served(nodes, LONG)
    stream = asyncio.create_task(served(nodes, LONG))
    await until(lambda: started(nodes, 1))
    assert await operator.drain(C) == ["gamma is drained"]
    assert (await placed(nodes))[C] == ([], [2], [])
    assert await stream == tokens
    assert await operator.drain(B) == ["beta is drained"]
    before = await placed(nodes)
    with pytest.raises(ProposalRefusedError, match="alpha is the last trusted node"):
        await operator.drain(A)
    assert operator.desired.drained == {B, C}
    assert await placed(nodes) == before
    assert await served(nodes, LONG) == tokens


async def test_without_a_trusted_node_private_blocks_are_dropped_and_a_stream_ends_with_the_reason(
    nodes: InProcessCluster, operator: Operator
) -> None:
    tokens = await served(nodes, LONG)
    await operator.trust(B, False)
    stream = asyncio.create_task(served(nodes, LONG))
    await until(lambda: started(nodes, 1))
    await operator.trust(A, False)
    held = {name: set(blocks) for name, (blocks, _, _) in (await placed(nodes)).items()}
    assert not nodes.private & (held[A] | held[B] | held[C])
    with pytest.raises(NodeLostError, match="no placement"):
        await stream
    assert await operator.trust(A, True) == ["alpha is trusted"]
    assert await served(nodes, LONG) == tokens


async def test_the_next_controller_starts_with_the_desired_state(
    nodes: InProcessCluster, operator: Operator, controller: Controller
) -> None:
    await operator.trust(B, False)
    await operator.drain(C)
    after = operator_of(nodes, controller)
    assert after.desired == operator.desired
    assert (controller.view.cluster.trusted, controller.view.rules.drained) == ((A,), {C})


async def test_a_drain_that_fails_for_lack_of_the_registry_leaves_the_node_in_use(
    nodes: InProcessCluster, operator: Operator, tmp_path: Path
) -> None:
    tokens = await served(nodes, LONG)
    for shard in (nodes.folder / "registry").iterdir():
        shard.rename(tmp_path / shard.name)
    with pytest.raises(ProposalRefusedError, match="could not be prepared"):
        await operator.drain(C)
    assert operator.desired.drained == frozenset()
    assert await served(nodes, LONG) == tokens


def problem_with_fast_beta(nodes: InProcessCluster) -> Problem:
    problem = problem_of(nodes.config, nodes.features, FIRST)
    times = np.tile([1e-3, 1e-6, 1e-3], (len(nodes.features), 1))  # (blocks, nodes)
    return replace(problem, prefill_s_per_token=times, decode_s_per_token=times)


async def test_a_node_that_joins_gets_blocks_at_once_if_a_plan_places_some_on_it(
    nodes: InProcessCluster, controller: Controller
) -> None:
    controller.planner.set_problem(problem_with_fast_beta(nodes))
    operator = operator_of(nodes, controller)
    await deploy(controller, FIRST)
    await operator.drain(B)
    assert controller.live is not None
    assert B not in controller.live.placement
    assert await operator.join(B) == ["beta is used again"]
    assert B in controller.live.placement
    assert controller.deployment.history[-1].action == "join"


async def test_a_node_that_joins_and_is_not_needed_changes_no_placement(
    nodes: InProcessCluster, operator: Operator, controller: Controller
) -> None:
    await operator.drain(C)
    live = controller.live
    assert await operator.join(C) == ["gamma is used again"]
    assert await operator.join(C) == []
    assert controller.live is live
    assert operator.desired.drained == frozenset()


class RefusingBeta:
    """Deploys for a controller, but refuses placements on beta; with `always`, all placements in beta's name."""

    def __init__(self, controller: Controller, always: bool = False) -> None:
        self._deploy = controller.deployment.deploy
        self._always = always
        self.tried: list[tuple[str, ...]] = []

    async def __call__(self, proposal: Proposal, suspects: Collection[str] = ()) -> LiveEpoch:
        self.tried.append(proposal.placement)
        if self._always or B in proposal.placement:
            raise ProposalRefusedError("beta: its disk is full", frozenset({B}))
        return await self._deploy(proposal, suspects)


async def test_a_drain_does_without_a_node_that_refuses_its_part_of_the_plan(
    nodes: InProcessCluster, operator: Operator, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.planner.set_problem(problem_with_fast_beta(nodes))
    refusing = RefusingBeta(controller)
    monkeypatch.setattr(controller.deployment, "deploy", refusing)
    assert await operator.drain(C) == ["gamma is drained"]
    assert [B in placement for placement in refusing.tried] == [True, False]
    assert controller.live is not None
    assert set(controller.live.placement) == {A}


async def test_a_drain_ends_once_the_same_node_refuses_again(
    operator: Operator, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing, before = RefusingBeta(controller, always=True), operator.desired
    monkeypatch.setattr(controller.deployment, "deploy", refusing)
    with pytest.raises(ProposalRefusedError, match="beta: its disk is full"):
        await operator.drain(C)
    assert len(refusing.tried) == 2
    assert operator.desired is before
    assert controller.view.rules.drained == frozenset()


async def test_a_drain_is_planned_again_while_other_epochs_go_live_but_not_for_ever(
    operator: Operator, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy_, tried = controller.deployment.deploy, []

    async def overtaken(proposal: Proposal, suspects: Collection[str] = ()) -> LiveEpoch:
        tried.append(proposal.based_on)
        controller.deployment.live = replace(controller.deployment.live, epoch=proposal.based_on + 1)  # type: ignore[type-var]
        return await deploy_(proposal, suspects)

    monkeypatch.setattr(controller.deployment, "deploy", overtaken)
    with pytest.raises(ProposalRefusedError, match="planned against epoch 3, but 4 is live"):
        await operator.drain(C)
    assert tried == [1, 2, 3]


async def test_a_node_whose_address_changes_is_reached_at_the_new_one_and_keeps_no_stream_waiting(
    nodes: InProcessCluster, operator: Operator, controller: Controller
) -> None:
    tokens = await served(nodes, LONG)
    proxy = TcpProxy(Address("127.0.0.1", free_ports(1)[0]), nodes.addresses[C])
    await proxy.open()
    try:
        content = dict(operator.desired.effective)
        moved = [node | ({"address": str(proxy.outside)} if node["name"] == C else {}) for node in content["nodes"]]
        assert await operator.apply({**content, "nodes": moved}) == [f"gamma is at {proxy.outside}"]
        assert controller.live is not None
        assert C not in controller.live.placement  # its blocks left before it was reached at another address
        assert controller.view.addresses[C] == proxy.outside
        assert controller.view.rules.drained == frozenset()
        await nodes.router.wait_for({C}, 10.0)
        await controller.membership.introduce()
        await deploy(controller, FIRST)
        assert await served(nodes, LONG) == tokens
    finally:
        proxy.close()


def content_without(operator: Operator, name: str) -> dict[str, Any]:
    content = dict(operator.desired.effective)
    return {**content, "nodes": [node for node in content["nodes"] if node["name"] != name]}


async def test_a_node_that_is_added_is_timed_so_that_plans_can_use_it(
    nodes: InProcessCluster, operator: Operator, controller: Controller
) -> None:
    whole = dict(operator.desired.effective)
    assert await nodes.rows(C, "blocks") == []
    assert await operator.apply(content_without(operator, C)) == ["gamma is removed"]
    assert C not in controller.view.addresses
    assert C not in nodes.router.peers
    assert await operator.apply(whole) == ["gamma is added"]
    assert {row["node"] for row in await nodes.rows(C, "blocks")} == {C}
    assert await nodes.rows(B, "blocks") == []


async def test_a_node_that_is_added_and_does_not_answer_is_named(
    nodes: InProcessCluster, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations_module, "_ANSWER_TIMEOUT_S", 0.3)
    whole = dict(operator.desired.effective)
    await operator.apply(content_without(operator, C))
    await nodes.stop(C)
    told = "gamma does not answer yet; profile once it does (`python -m flows.profile`)"
    assert await operator.apply(whole) == ["gamma is added", told]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"address": "127.0.0.1:9"}, "delta"),  # no keys were made for it
        ({}, "nodes: delta: has no address"),
        ({"address": "nowhere"}, r"nodes\.3\.address: 'nowhere' is not host:port"),
    ],
)
async def test_a_node_that_cannot_be_added_changes_nothing(
    operator: Operator, controller: Controller, node: dict[str, str], message: str
) -> None:
    content, before = dict(operator.desired.effective), operator.desired
    added = {"name": "delta", "memory": "8 MiB", **node}
    with pytest.raises(ConfigError, match=message):
        await operator.apply({**content, "nodes": [*content["nodes"], added]})
    assert operator.desired is before
    assert set(controller.view.addresses) == {A, B, C}


async def test_more_private_layers_hold_at_once_although_no_placement_can_be_prepared_for_lack_of_the_registry(
    nodes: InProcessCluster, operator: Operator, controller: Controller, tmp_path: Path
) -> None:
    tokens = await served(nodes)
    await deploy(controller, [A, A, C, B, B, B, B, A])
    registry, away = nodes.folder / "registry", tmp_path / "away"
    registry.rename(away)
    async with asyncio.timeout(20):
        told = await operator.apply({**operator.desired.effective, "private_layers": 2})
    assert told == ["private_layers is 2"]
    assert (await placed(nodes))[C][0] == []
    away.rename(registry)
    assert await served(nodes) == tokens


async def test_a_join_returns_although_a_lost_node_cannot_be_replaced_for_lack_of_the_registry(
    nodes: InProcessCluster,
    operator: Operator,
    controller: Controller,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operations_module, "_RECOVERS_WITHIN_S", 0.5)
    tokens = await served(nodes)
    await operator.drain(C)
    await deploy(controller, [A, A, B, B, B, B, B, A])
    registry, away = nodes.folder / "registry", tmp_path / "away"
    registry.rename(away)
    await nodes.stop(B)
    async with asyncio.timeout(20):
        told = await operator.join(C)
    assert told == ["gamma is used again", "no placement can be prepared yet; requests wait for one"]
    away.rename(registry)
    assert await served(nodes) == tokens


async def test_streams_that_do_not_leave_a_drained_node_in_time_are_replayed(
    nodes: InProcessCluster, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations_module, "_SETTLE_TIMEOUT_S", 1.0)
    tokens = await served(nodes, LONG)
    stream = asyncio.create_task(served(nodes, LONG))
    await until(lambda: started(nodes, 1))
    async with nodes.sessions.paused():
        told = await operator.drain(C)
    assert told == [
        "gamma is drained",
        "streams had not left earlier placements within 1 s, and are replayed",
    ]
    assert await stream == tokens
