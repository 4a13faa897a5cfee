"""A node that answers slowly, or never, holds up no move for long, and none at all if it hosts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from resplit.control import node_commands
from resplit.control.controller import Controller
from resplit.errors import ProposalRefusedError
from resplit.model.source import StoredModel
from tests.support.controllers import running_controller, served
from tests.support.hostile import Honest, HostileNode, hangs, hangs_in
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import A, B, C, three_node_config

FIRST, SECOND = [A, A, B, B, B, B, B, A], [A, A, A, A, B, B, B, A]
ON_GAMMA = [A, A, B, B, C, C, B, A]
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


async def test_a_host_that_never_answers_a_prepare_is_faulty_once_its_load_has_had_time(
    nodes: InProcessCluster, controller: Controller, gamma: HostileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_commands, "_OTHERWISE_WITHIN_S", 1.5)  # its blocks have some kilobytes
    gamma.lies["Command"] = hangs_in("prepare")
    async with asyncio.timeout(HELD_UP_S):
        with pytest.raises(ProposalRefusedError, match="gamma: it did not answer 'prepare' within") as refused:
            await deploy(controller, ON_GAMMA)
        assert await served(nodes)
    assert refused.value.refused_by == {C}
    assert C in nodes.router.faults
    gamma.break_connections()


async def test_a_host_that_is_lost_while_it_prepares_is_not_waited_for(
    nodes: InProcessCluster, controller: Controller, gamma: HostileNode
) -> None:
    gamma.lies["Command"] = hangs_in("prepare")
    gamma.heard.clear()

    async def asked_to_prepare() -> bool:
        return "prepare" in {command.kind for command in gamma.heard_in("Command")}

    async with asyncio.timeout(HELD_UP_S):
        deploying = asyncio.create_task(deploy(controller, ON_GAMMA))
        await until(asked_to_prepare)
        gamma.lies["Tokens"] = hangs  # it does not come back
        nodes.router.drop(C)  # as its heartbeats do for a process that stands still
        with pytest.raises(ProposalRefusedError, match="gamma was lost before it answered 'prepare'"):
            await deploying
        assert await served(nodes)
    gamma.break_connections()


async def test_a_host_that_comes_back_at_once_may_still_answer(
    nodes: InProcessCluster, controller: Controller, gamma: HostileNode
) -> None:
    asked, answering = asyncio.Event(), asyncio.Event()

    async def later(stream: Any, honest: Honest) -> None:
        asked.set()
        await answering.wait()
        await honest(stream)

    gamma.lies["Command"] = later
    deploying = asyncio.create_task(deploy(controller, ON_GAMMA))
    await asked.wait()
    nodes.router.drop(C)
    await nodes.router.wait_for({C}, 10)
    answering.set()
    await deploying
    assert controller.live is not None
    assert list(controller.live.placement) == ON_GAMMA
