"""Drain, join and trust over real nodes on one event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from resplit.control.controller import Controller
from resplit.control.operations import Operator
from resplit.errors import NodeLostError, ProposalRefusedError
from tests.support.controllers import FIRST, LONG, operator_of, placed, served, started
from tests.support.in_process import InProcessCluster, deploy, until
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C


@pytest.fixture
async def operator(nodes: InProcessCluster, controller: Controller) -> Operator:
    """The operator of a cluster that serves, whose controller has a problem to plan with."""
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    operator = operator_of(nodes, controller)
    await deploy(controller, FIRST)
    return operator


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
