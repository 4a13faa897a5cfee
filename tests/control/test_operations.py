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
    """Of a cluster that serves, and whose controller knows enough to plan."""
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    operator = operator_of(nodes, controller)
    await deploy(controller, FIRST)
    return operator


async def test_what_is_drained_is_moved_and_what_cannot_be_is_refused_and_changes_nothing(
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


async def test_where_nobody_may_hold_what_is_private_a_stream_ends_with_the_reason(
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


async def test_commands_are_kept_for_the_next_controller(
    nodes: InProcessCluster, operator: Operator, controller: Controller
) -> None:
    await operator.trust(B, False)
    await operator.drain(C)
    after = operator_of(nodes, controller)
    assert after.desired == operator.desired
    assert (controller.view.cluster.trusted, controller.view.rules.drained) == ((A,), {C})


async def test_a_registry_that_fails_leaves_a_node_in_use(
    nodes: InProcessCluster, operator: Operator, tmp_path: Path
) -> None:
    tokens = await served(nodes, LONG)
    for shard in (nodes.folder / "registry").iterdir():
        shard.rename(tmp_path / shard.name)
    with pytest.raises(ProposalRefusedError, match="could not be prepared"):
        await operator.drain(C)
    assert operator.desired.drained == frozenset()
    assert await served(nodes, LONG) == tokens
