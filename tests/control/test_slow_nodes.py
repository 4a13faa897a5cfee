"""A node that hosts nothing holds up no move of others, however slowly it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from resplit.control.controller import Controller
from resplit.model.source import StoredModel
from tests.support.controllers import running_controller, served
from tests.support.hostile import HostileNode, hangs
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import A, B, C, three_node_config

FIRST, SECOND = [A, A, B, B, B, B, B, A], [A, A, A, A, B, B, B, A]
HELD_UP_S = 4.0  # a node that does not answer is faulty after 5 s or more


@pytest.fixture
async def gamma() -> HostileNode:
    return HostileNode()


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path, gamma: HostileNode) -> AsyncIterator[InProcessCluster]:
    async with in_process(three_node_config(), stored_model, tmp_path, {C: gamma.service}) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcessCluster) -> AsyncIterator[Controller]:
    async with running_controller(nodes, FIRST) as controller:
        yield controller


async def test_a_node_that_does_not_answer_its_commands(
    nodes: InProcessCluster, controller: Controller, gamma: HostileNode
) -> None:
    gamma.lies["Command"] = hangs
    async with asyncio.timeout(HELD_UP_S):
        await deploy(controller, SECOND)
        assert await served(nodes)
    gamma.break_connections()  # its calls end


async def test_a_node_that_returns_and_does_not_report(
    nodes: InProcessCluster, controller: Controller, gamma: HostileNode
) -> None:
    gamma.lies["Report"] = hangs

    async def asked_to_report() -> bool:
        return bool(gamma.heard_in("Report"))

    gamma.break_connections()
    await until(asked_to_report)
    async with asyncio.timeout(HELD_UP_S):
        await deploy(controller, SECOND)
        assert await served(nodes)
    gamma.break_connections()
