"""Nodes that do not obey, while an operator excludes them or other epochs need them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from grpclib.server import Stream

from resplit.control import deployment as deployment_module
from resplit.control import node_commands as commands_module
from resplit.control.controller import Controller
from resplit.control.operations import Operator
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from resplit.wire.node_pb2 import CachePart, CacheReply, CommandReply, CommandRequest, Step, Token
from tests.support.controllers import FIRST, LONG, operator_of, served, slow_to_prepare, started
from tests.support.hostile import Honest, HostileNode, alters
from tests.support.in_process import InProcessCluster, deploy, until
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C

PRIVATE_ON_B = (B, B, C, A, A, A, A, B)  # the gateway sends every step to B
PUBLIC_ON_B = (A, A, C, B, B, B, A, A)


async def nonsense(request: CommandRequest, timeout: float) -> CommandReply:  # noqa: ASYNC109
    return CommandReply(body="nonsense")


async def refusal(request: CommandRequest, timeout: float) -> CommandReply:  # noqa: ASYNC109
    return CommandReply(error="I will not", error_kind="privacy")


async def hang(request: CommandRequest, timeout: float) -> CommandReply:  # noqa: ASYNC109
    await asyncio.sleep(timeout)
    raise TimeoutError


async def lie(request: CommandRequest, timeout: float) -> CommandReply:  # noqa: ASYNC109
    return CommandReply(body="{}")  # it says that it obeys, and does nothing


Operation = Callable[[Operator], Any]


async def distrust(operator: Operator) -> list[str]:
    return await operator.trust(B, False)


async def drain(operator: Operator) -> list[str]:
    return await operator.drain(B)


async def remove(operator: Operator) -> list[str]:
    content = operator.desired.effective
    nodes = [node for node in content["nodes"] if node["name"] != B]
    return await operator.apply({**content, "nodes": nodes, "trusted": [A]})


# Each operation with each answer, and each of both with each placement.
EXCLUSIONS = [
    (operation, answer, (PRIVATE_ON_B, PUBLIC_ON_B)[(row + column) % 2])
    for row, operation in enumerate([distrust, drain, remove])
    for column, answer in enumerate([nonsense, refusal, hang, lie])
]


@pytest.mark.parametrize(("operation", "answer", "placement"), EXCLUSIONS)
async def test_an_exclusion_needs_no_help_of_the_node_that_is_excluded(
    nodes: InProcessCluster,
    operator: Operator,
    controller: Controller,
    monkeypatch: pytest.MonkeyPatch,
    operation: Operation,
    answer: Any,
    placement: tuple[str, ...],
) -> None:
    monkeypatch.setattr(commands_module, "_OTHERWISE_WITHIN_S", 1.5)
    monkeypatch.setattr(deployment_module, "_SUSPECTS_WITHIN_S", 1.5)
    tokens = await served(nodes, LONG)
    await controller.deploy(Proposal(placement, "re-split", 1))
    sent = steps_sent_to(nodes, B)
    nodes.peer(B)._stub.Command = answer
    stream = asyncio.create_task(served(nodes, LONG))
    await until(lambda: started(nodes, 1))
    begun_s = time.monotonic()
    assert await operation(operator)
    assert time.monotonic() - begun_s < 10
    assert controller.live is not None
    assert controller.view.rules.violation(controller.live.placement) is None
    sent.clear()
    assert await stream == tokens
    assert await served(nodes, LONG) == tokens
    assert not any(breaks_a_rule(controller, step) for step in sent)


async def test_from_the_moment_that_trust_ends_no_step_follows_a_route_that_breaks_the_rule(
    nodes: InProcessCluster, operator: Operator, controller: Controller
) -> None:
    tokens = await served(nodes, LONG)
    await controller.deploy(Proposal(PRIVATE_ON_B, "re-split", 1))
    sent = steps_sent_to(nodes, B)
    preparing, go_on = slow_to_prepare(nodes)
    stream = asyncio.create_task(served(nodes, LONG))
    await until(lambda: started(nodes, 1))
    distrusting = asyncio.create_task(operator.trust(B, False))
    await preparing.wait()  # the rule holds, and no allowed placement is live yet
    sent.clear()
    waiting = asyncio.create_task(served(nodes, LONG))
    reason = nodes.sessions.ready()
    await asyncio.sleep(0.2)
    go_on.set()
    assert sent == []
    assert reason == "block embed is private and beta is not trusted"
    assert await distrusting == ["beta is not trusted any more"]
    assert [await stream, await waiting] == [tokens, tokens]
    assert sent == []
    assert not any(move.replayed for record in nodes.sessions.records(1) for move in record.moves)


PRIVATE_ON_A = (A, A, C, A, A, A, A, A)  # the replicas of private caches are on B


@pytest.mark.parametrize("transfer", ["replica", "move"])
async def test_from_the_moment_that_trust_ends_a_running_transfer_of_private_caches_stops(
    nodes: InProcessCluster, controller: Controller, transfer: str
) -> None:
    suspect, parts, stopped = HostileNode(), list[CachePart](), False

    async def streams() -> list[int]:
        """One stream after the other, because a stream may end before its caches move; the tokens of the last."""
        answer = await served(nodes, LONG)
        while not stopped:
            answer = await served(nodes, LONG)
        return answer

    async def never_answered(stream: Stream[CachePart, CacheReply], honest: Honest) -> None:
        while (part := await stream.recv_message()) is not None:
            parts.append(part)

    suspect.lies["Caches"] = never_answered
    await nodes.stop(B)
    await nodes.start(B, suspect.service)
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    operator = operator_of(nodes, controller)
    await deploy(controller, PRIVATE_ON_A)
    tokens = await served(nodes, LONG)
    parts.clear()
    if transfer == "move":
        without_replicas(nodes)
    stream = asyncio.create_task(streams())
    await until(lambda: started(nodes, 1), timeout_s=30)
    if transfer == "move":
        await deploy(controller, PRIVATE_ON_B)

    async def some_are_sent() -> bool:
        return any(nodes.private.intersection(part.blocks) for part in parts)

    async def transfers_end() -> bool:
        if B in nodes.router.cluster.trusted:  # the command has not been carried out yet
            return False
        if any(block in nodes.private for targets in nodes.router._transfers.values() for block, _ in targets):
            return False
        arrived = len(parts)
        await asyncio.sleep(0.2)  # what the other node sent before it was told arrives meanwhile
        return len(parts) == arrived

    await until(some_are_sent, timeout_s=30)
    async with nodes.sessions.paused():  # so the stream does not end, which would stop the transfer too
        trusting = asyncio.create_task(operator.trust(B, False))
        await until(transfers_end, timeout_s=30)
        stopped = True
        parts.clear()
    assert await trusting == ["beta is not trusted any more"]
    assert await stream == tokens
    assert not any(nodes.private.intersection(part.blocks) for part in parts)


@pytest.mark.parametrize("answer", [nonsense, refusal, hang])
async def test_a_node_that_hosts_nothing_vetoes_no_move_and_no_recovery_of_others(
    nodes: InProcessCluster, operator: Operator, controller: Controller, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setattr(commands_module, "_OTHERWISE_WITHIN_S", 1.5)
    monkeypatch.setattr(commands_module, "_ANSWER_WITHIN_S", {})
    await controller.deploy(Proposal((A, A, B, B, B, B, B, A), "re-split", 1))
    tokens = await served(nodes)
    nodes.peer(C)._stub.Command = answer
    await controller.deploy(Proposal((A, A, A, A, B, B, B, A), "re-split", 2))
    assert await served(nodes) == tokens
    await nodes.stop(B)

    async def recovered() -> bool:
        return controller.live is not None and B not in controller.live.placement

    await until(recovered, 10)
    assert await served(nodes) == tokens


async def test_an_epoch_that_is_prepared_while_trust_ends_does_not_go_live_against_the_rule(
    nodes: InProcessCluster, operator: Operator, controller: Controller
) -> None:
    await controller.deploy(Proposal(PRIVATE_ON_A, "re-split", 1))
    tokens = await served(nodes)
    preparing, go_on = slow_to_prepare(nodes)
    deploying = asyncio.create_task(controller.deployment.deploy(Proposal(PRIVATE_ON_B, "join", 2)))
    await preparing.wait()
    distrusting = asyncio.create_task(operator.trust(B, False))

    async def the_rule_holds() -> bool:
        return controller.view.cluster.trusted == (A,)

    await until(the_rule_holds)
    go_on.set()
    with pytest.raises(ProposalRefusedError, match="block embed is private and beta is not trusted"):
        await deploying
    assert await distrusting == ["beta is not trusted any more"]
    assert controller.live is not None
    assert controller.live.placement == PRIVATE_ON_A
    assert await served(nodes) == tokens


async def drain_beta(nodes: InProcessCluster, operator: Operator) -> None:
    await operator.drain(B)


async def lose_beta(nodes: InProcessCluster, operator: Operator) -> None:
    await nodes.stop(B)


@pytest.mark.parametrize("what", [drain_beta, lose_beta])
async def test_a_re_split_whose_node_hangs_gives_way_to_what_cannot_wait(
    nodes: InProcessCluster,
    operator: Operator,
    controller: Controller,
    monkeypatch: pytest.MonkeyPatch,
    what: Callable[[InProcessCluster, Operator], Any],
) -> None:
    monkeypatch.setattr(commands_module, "_OTHERWISE_WITHIN_S", 1.5)
    await controller.deploy(Proposal((A, A, B, B, B, B, B, A), "re-split", 1))
    tokens = await served(nodes)
    preparing = asyncio.Event()

    async def hang(request: CommandRequest, timeout: float) -> CommandReply:  # noqa: ASYNC109
        preparing.set()
        await asyncio.sleep(timeout)
        raise TimeoutError

    nodes.peer(C)._stub.Command = hang
    deploying = asyncio.create_task(controller.deploy(Proposal((A, A, B, C, B, B, B, A), "re-split", 2)))
    await preparing.wait()
    begun_s = time.monotonic()
    changing = asyncio.create_task(what(nodes, operator))
    with pytest.raises(ProposalRefusedError, match="a change that could not wait came meanwhile"):
        await deploying
    await changing

    async def recovered() -> bool:
        return controller.live is not None and not {B, C} & set(controller.live.placement)

    await until(recovered, 10)
    assert time.monotonic() - begun_s < 10
    assert await served(nodes) == tokens


async def test_a_head_whose_tokens_are_outside_the_vocabulary_is_replaced(
    nodes: InProcessCluster, controller: Controller
) -> None:
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    await deploy(controller, PRIVATE_ON_A)
    tokens = await served(nodes)
    liar = HostileNode()

    def beyond(token: Token) -> Token:
        token.token_ids[:] = [nodes.model.spec.vocabulary]
        return token

    liar.lies["Tokens"] = alters(beyond)
    await nodes.stop(B)
    await nodes.start(B, liar.service)
    await deploy(controller, PRIVATE_ON_B)
    assert await served(nodes) == tokens
    assert controller.live is not None
    assert B not in controller.live.placement


@pytest.mark.parametrize("operation", [distrust, drain, remove])
async def test_an_exclusion_does_not_wait_for_the_command_that_its_node_hangs_in(
    nodes: InProcessCluster,
    operator: Operator,
    controller: Controller,
    monkeypatch: pytest.MonkeyPatch,
    operation: Operation,
) -> None:
    monkeypatch.setattr(deployment_module, "_ANSWER_WITHIN_S", 0.3)
    await controller.deploy(Proposal(PRIVATE_ON_A, "re-split", 1))
    tokens = await served(nodes)
    asked = asyncio.Event()

    async def hang(request: CommandRequest, timeout: float) -> CommandReply:  # noqa: ASYNC109
        asked.set()
        await asyncio.sleep(timeout)
        raise TimeoutError

    nodes.peer(B)._stub.Command = hang
    profiling = asyncio.create_task(controller.membership.profile())
    await asked.wait()
    async with asyncio.timeout(10):
        told = await operation(operator)
    pending = "beta does not answer; it drops its private blocks as soon as it answers"
    assert (pending in told) == (operation is distrust)
    assert await served(nodes) == tokens
    profiling.cancel()


def without_replicas(nodes: InProcessCluster) -> None:
    context = nodes.sessions._context
    limits = context.cluster.limits.model_copy(update={"copy_every": 0})
    context.cluster = context.cluster.model_copy(update={"limits": limits})


def steps_sent_to(nodes: InProcessCluster, name: str) -> list[Step]:
    """The steps that the gateway sends to a node from now on."""
    peer, sent = nodes.peer(name), list[Step]()
    send = peer.send

    def recorded(step: Step) -> None:
        sent.append(step)
        send(step)

    peer.send = recorded  # type: ignore[method-assign]
    return sent


def breaks_a_rule(controller: Controller, step: Step) -> bool:
    """Whether the epoch of a step breaks a rule that holds now."""
    placements = {live.epoch: live.placement for live in controller.deployment.history}
    return controller.view.rules.violation(placements[step.epoch]) is not None
