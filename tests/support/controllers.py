"""Helpers of controller tests on a cluster of three nodes, and the requests and placements that these tests use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from resplit.config import ClusterFile
from resplit.control.controller import Controller
from resplit.control.operations import Operator
from resplit.gateway.engine import GenerationRequest
from resplit.types import Sampling
from resplit.wire.node_pb2 import CommandReply, CommandRequest
from tests.support.in_process import InProcessCluster, deploy
from tests.support.three_nodes import A, B, C

FIRST = [A, A, B, B, C, C, B, A]
SECOND = [A, A, B, C, C, B, B, A]
REQUEST = GenerationRequest((5, 17, 40), 8, Sampling(), "chat", frozenset())
LONG = replace(REQUEST, max_new_tokens=60)


@asynccontextmanager
async def running_controller(nodes: InProcessCluster, first: Sequence[str] = ()) -> AsyncIterator[Controller]:
    """A controller that has introduced itself to the nodes and, if `first` is given, has deployed that placement."""
    controller = nodes.controller()
    await controller.membership.introduce()
    if first:
        await deploy(controller, list(first))
    yield controller
    await controller.stop()


async def placed(nodes: InProcessCluster) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """The blocks, the served epochs and the prepared epochs of each node."""
    states = {name: await nodes.state(name) for name in (A, B, C)}
    return {name: (list(state.blocks), list(state.epochs), list(state.prepared)) for name, state in states.items()}


async def served(nodes: InProcessCluster, request: GenerationRequest = REQUEST) -> list[int]:
    return [token.token_id async for token in nodes.sessions.generate(request)]


async def started(nodes: InProcessCluster, count: int) -> bool:
    """Whether `count` sessions have more than six positions."""
    return sum(session.position > 6 for session in nodes.sessions._live.values()) == count


def operator_of(
    nodes: InProcessCluster, controller: Controller, emulate: Mapping[str, Any] | None = None, **more: Any
) -> Operator:
    """An operator of this cluster, whose desired state has no changes yet.

    Its file has `more` keys, and every node has `emulate`, if that is given.
    """
    emulated = {"emulate": emulate} if emulate else {}
    content = {
        "name": nodes.config.name,
        "source": nodes.config.source,
        "trusted": list(nodes.config.trusted),
        "nodes": [
            {"name": each.name, "memory": f"{each.memory} B", "address": str(nodes.addresses[each.name]), **emulated}
            for each in nodes.config.nodes
        ],
        "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
        "kv_tokens": nodes.config.kv_tokens,
        **more,
    }
    return Operator(controller, nodes.router, ClusterFile(content), nodes.folder / "desired_state.json")


def steps(controller: Controller, epoch: int) -> list[str]:
    return [step.step for step in controller.log.steps(epoch)]


def slow_to_prepare(nodes: InProcessCluster) -> tuple[asyncio.Event, asyncio.Event]:
    """Have alpha wait before it prepares. The first event is set when it is asked to, the second lets it go on."""
    preparing, go_on = asyncio.Event(), asyncio.Event()
    stub = nodes.peer(A)._stub
    obey = stub.Command

    async def slowly(request: CommandRequest, timeout: float) -> CommandReply:  # noqa: ASYNC109
        if request.kind == "prepare":
            preparing.set()
            await go_on.wait()
        reply: CommandReply = await obey(request, timeout=timeout)
        return reply

    stub.Command = slowly
    return preparing, go_on
