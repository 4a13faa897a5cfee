"""Ready before it is needed: plans for likely changes, blocks that stand by, and moves that load nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from pydantic import TypeAdapter

from resplit import planner
from resplit.control.api import create_control_api
from resplit.control.controller import Controller
from resplit.control.idle_planner import IdlePlanner
from resplit.control.monitor import Monitor
from resplit.decide import Ready, Settings
from resplit.decide.likely import likely_changes
from resplit.model.source import StoredModel
from resplit.policies import make_policy
from resplit.types import Problem
from tests.support.constant_passes import constant_model, serve
from tests.support.controllers import FIRST, operator_of
from tests.support.decisions import FAST, SLOW, halves, problem
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C, three_node_config

SETTINGS = Settings(horizon_s=600.0, cooldown_s=1e6)


class QuickPlanner(IdlePlanner):
    """Plans in a thread of this process, with few steps."""

    async def plan(self, problem: Problem) -> tuple[str, ...] | None:
        self.processor_s += 0.001
        return (await asyncio.to_thread(planner.solve, problem, work_limit=50)).placement


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """Three nodes, each of which has room for the whole model."""
    async with in_process(three_node_config(limits={}), stored_model, tmp_path) as running:
        yield running


@pytest.fixture
async def ready(nodes: InProcessCluster, controller: Controller) -> Controller:
    """A controller that is armed, has planned ahead, and whose nodes keep ready what it wants."""
    controller.readiness.planner = QuickPlanner()
    await asyncio.to_thread(planner.load)  # compiles its kernels
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    controller.fast_loop.set_model(constant_model())
    await deploy(controller, FIRST)
    controller.tasks.spawn(controller.fast_loop.run(), "fast loop")
    controller.tasks.spawn(controller.readiness.run(), "readiness")
    serve(controller, 10)
    controller.fast_loop.arm(make_policy("resplit"), SETTINGS, 600.0)
    await until(lambda: stands_by(nodes, controller), 60)
    return controller


async def standby(nodes: InProcessCluster) -> dict[str, tuple[int, ...]]:
    return {name: (await nodes.state(name)).standby.blocks for name in (A, B, C)}


async def stands_by(nodes: InProcessCluster, controller: Controller) -> bool:
    """Whether all is planned, and each node has loaded what it should; tells the controller what stands by."""
    held = await standby(nodes)
    controller.readiness.standby = lambda: held
    status = controller.readiness.status()
    if not status.changes or status.left:
        return False
    assert controller.live is not None
    placements = controller.readiness.ready().placements
    wanted = {
        name: {block for each in placements for block, host in enumerate(each) if host == name}
        - {block for block, host in enumerate(controller.live.placement) if host == name}
        for name in held
    }
    return all(set(held[name]) == wanted[name] for name in held)


async def test_a_node_that_becomes_slow_is_left_without_loading_anything(ready: Controller) -> None:
    status = ready.readiness.status()
    assert f"{B} lost" in status.changes
    assert status.processor_s > 0
    serve(ready, 2, **{B: 50.0})
    await until(lambda: asyncio.sleep(0, ready.deployment.live_number == 2))
    assert ready.live is not None
    assert B not in ready.live.placement
    live = ready.deployment.history[-1]
    assert live.loaded_bytes == 0
    assert live.ready_bytes > 0


async def test_the_plan_for_a_lost_node_is_used_without_planning_again(
    nodes: InProcessCluster, ready: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("resplit.control.planning.plan_without")
    assert ready.live is not None
    await nodes.stop(B)
    await until(lambda: asyncio.sleep(0, ready.deployment.live_number == 2), 10)
    assert B not in ready.live.placement
    assert ready.deployment.history[-1].loaded_bytes == 0


async def test_the_end_of_trust_and_a_drain_drop_what_stands_by(nodes: InProcessCluster, ready: Controller) -> None:
    operator = operator_of(nodes, ready)
    private = {block for block, feature in enumerate(nodes.features) if feature.private}
    assert private & set((await standby(nodes))[B])
    await operator.trust(B, on=False)
    assert not private & set((await standby(nodes))[B])
    await operator.drain(C)
    assert (await nodes.state(C)).held_bytes == 0


async def test_plans_are_made_in_a_process_that_is_started_again_after_it_ended() -> None:
    idle = IdlePlanner()
    slow = likely_changes(problem(halves(SLOW, FAST, 2)))[-1]
    try:
        first = await idle.plan(slow.problem)
        assert first is not None
        assert idle._process is not None
        idle._process.kill()
        await idle._process.wait()
        assert await idle.plan(slow.problem) is None
        assert await idle.plan(slow.problem) == first
        assert idle.processor_s > 0
    finally:
        await idle.stop()


async def test_a_flow_reads_what_is_ready(nodes: InProcessCluster, ready: Controller) -> None:
    app = create_control_api(ready, operator_of(nodes, ready), Monitor(nodes.router.peers, 8), "secret")
    headers = {"Authorization": "Bearer secret"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://control") as http:
        answer = await http.get("/ready", headers=headers)
    assert answer.status_code == 200, answer.text
    read = TypeAdapter(Ready).validate_python(answer.json())
    assert read == ready.readiness.ready()
    assert read.placements
    assert read.loaded
