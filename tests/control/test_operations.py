"""Drain, join, trust and a changed file over real nodes on one event loop, of which one may not obey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpclib.server import Stream

from resplit.cluster.local import free_ports
from resplit.control import deployment as deployment_module
from resplit.control import node_commands as commands_module
from resplit.control import operations as operations_module
from resplit.control.controller import Controller
from resplit.control.operations import Operator
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import ConfigError, NodeLostError, ProposalRefusedError
from resplit.types import Problem
from resplit.wire.addresses import Address
from resplit.wire.node_pb2 import CachePart, CacheReply, CommandReply, CommandRequest, Step, Token
from tests.support.controllers import FIRST, LONG, operator_of, placed, served, slow_to_prepare, started
from tests.support.hostile import Honest, HostileNode, alters
from tests.support.in_process import InProcessCluster, deploy, until
from tests.support.latest_problem import problem_of
from tests.support.tcp_proxy import TcpProxy
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


@pytest.mark.parametrize("placement", [PRIVATE_ON_B, PUBLIC_ON_B])
@pytest.mark.parametrize("answer", [nonsense, refusal, hang, lie])
@pytest.mark.parametrize("operation", [distrust, drain, remove])
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
