"""One hostile member among honest ones says any message at any moment, and nobody else is harmed.

Real nodes, controller and gateway run on one event loop. The time limits for the hostile member are short.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from google.protobuf.message import Message
from grpclib.exceptions import GRPCError, StreamTerminatedError
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from resplit.control import deployment, monitor, node_commands, operations
from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from resplit.control.operations import Operator
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError, ResplitError
from resplit.gateway.sessions import permits, router
from resplit.model.source import StoredModel
from resplit.node import probe
from resplit.process.cancellation import VitalTasks
from resplit.wire.node_pb2 import CachePart, Step, Token
from resplit.wire.permits import Permit
from tests.support.cluster import reference
from tests.support.controllers import operator_of
from tests.support.forgeries import LARGEST, forge_everything
from tests.support.hostile import (
    NONSENSE_REPLIES,
    HostileClient,
    HostileNode,
    Lie,
    answers,
    breaks,
    draws,
    hangs,
    refuses,
)
from tests.support.in_process import InProcessCluster, in_process
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import PROMPT, generate, generation_request, three_node_config
from tests.support.wire_fuzzing import CALLS, FRAMES, PARTS, STEPS

A, B, C, MALLORY = "alpha", "beta", "gamma", "mallory"
HONEST = (A, B, C)
NEW_TOKENS = 40
WITHOUT = ((A, A, B, C, C, B, B, A), (B, B, A, A, C, B, A, B))
WITH = ((A, A, MALLORY, MALLORY, C, B, B, A), (B, A, C, B, MALLORY, A, MALLORY, B))
PRIVATE = {0, 1, 7}
EXAMPLES = 5
# Time limits for a node that does not answer: those of the code are some seconds longer.
SHORT_LIMITS = (
    (node_commands, "_OTHERWISE_WITHIN_S", 1.0),
    (node_commands, "_ANSWER_WITHIN_S", {"prepare": 5.0, "connect": 2.0}),
    (deployment, "_SUSPECTS_WITHIN_S", 1.0),
    (operations, "_SETTLE_TIMEOUT_S", 2.0),
    (monitor, "PERIOD_S", 0.2),
    (monitor, "_ANSWER_WITHIN_S", 1.0),
    (permits, "_ANSWERS_WITHIN_S", 2.0),
    (permits, "_OTHERS_ANSWER_WITHIN_S", 0.5),
    (probe, "_ECHO_WITHIN_S", 0.3),
    (router, "_FIRST_WAIT_S", 0.05),
    (router, "_LONGEST_WAIT_S", 0.2),
)
EXCLUDED_WITHIN_S = 30.0
ANSWERED_WITHIN_S = 60.0
LIES: dict[str, Lie] = {
    "hangs": hangs,
    "breaks": breaks,
    "refuses": refuses(),
    "nothing": answers(),
    "bytes": answers(b"\xff" * 9),
    "endless": answers(*[b""] * 50),
    "nonsense": draws([*NONSENSE_REPLIES["Command"], *NONSENSE_REPLIES["Report"]]),
}
NODE_CALLS = ("Steps", "Tokens", "Command", "Report", "Echo", "Caches", "TransferCache", "Permit", "Close")
ATTEMPTS = st.sampled_from([0, 1, LARGEST])
PERMITS = st.none() | st.builds(
    lambda attempt, epoch: Permit(attempt, 256, frozenset({epoch}), dict.fromkeys(range(8), MALLORY)).to_wire("", True),
    ATTEMPTS,
    st.integers(1, 5),
)
TOKENS = st.builds(
    Token,
    position=st.integers(0, len(PROMPT) + NEW_TOKENS) | st.just(LARGEST),
    token_ids=st.lists(st.sampled_from([0, 3, 299, -1, 2**40]), max_size=3),
    error=st.sampled_from(["", "no"]),
    error_kind=st.sampled_from(["", "data", "lost", "stale", "no such word"]),
    attempt=ATTEMPTS,
)
Aimed = Step | CachePart | Token
_Result = TypeVar("_Result")


@dataclass
class World:
    """Four real nodes, of which mallory is hostile, their gateway and controller, on the event loop of `runner`."""

    runner: asyncio.Runner
    nodes: InProcessCluster
    controller: Controller
    operator: Operator
    tasks: VitalTasks
    mallory: HostileNode
    liar: HostileClient
    expected: list[int]

    def run(self, work: Coroutine[Any, Any, _Result], within_s: float = ANSWERED_WITHIN_S) -> _Result:
        """Run some work, while everything else goes on too; TimeoutError if it takes longer."""
        return self.runner.run(asyncio.wait_for(work, within_s))

    async def failures(self) -> list[BaseException]:
        """The errors of vital tasks: a process would have ended with them."""
        owners = self.tasks, self.nodes.router.tasks, self.controller.tasks
        return [owner._failure for owner in owners if owner._failure]

    def aim(self, message: Aimed, at: int | None) -> None:
        """Have a message name a running session and the live epoch, unless `at` is None."""
        sessions = self.nodes.sessions.session_names()
        if at is not None and self.controller.live:
            message.epoch = self.controller.live.epoch
            message.session = sessions[at % len(sessions)] if sessions else message.session


@dataclass
class Request:
    """A request, and how many epochs had been live when it began, and when it ended."""

    answer: asyncio.Task[list[int]]
    first: int
    last: int | None = None


class HostileMember(RuleBasedStateMachine):
    """What an operator, users and the hostile member do, in any order."""

    world: World  # set by the test

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    @initialize()
    def begin(self) -> None:
        self.world.run(self._begin())

    async def _begin(self) -> None:
        world = self.world
        world.mallory.lies.clear()
        world.mallory.heard.clear()
        world.nodes.router.faults.clear()
        await world.nodes.router.wait_for({*HONEST, MALLORY}, 10.0)
        await world.operator.join(MALLORY)
        await self._deploy(WITHOUT[0])

    @rule(call=st.sampled_from(NODE_CALLS) | st.just("Command"), lie=st.sampled_from(sorted(LIES)))
    def lie(self, call: str, lie: str) -> None:
        self.world.mallory.lies[call] = LIES[lie]

    @rule()
    def talk_nonsense(self) -> None:
        self.world.mallory.talk_nonsense()

    @rule()
    def be_honest(self) -> None:
        self.world.mallory.lies.clear()

    @rule()
    def break_connections(self) -> None:
        self.world.mallory.break_connections()

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=5), at=st.none() | st.integers(0, 2))
    def say(self, tokens: list[Token], at: int | None) -> None:
        for token in tokens:
            self.world.aim(token, at)
        self.world.run(self.world.mallory.say(*tokens))

    @rule(at=st.integers(0, 2))
    def forge(self, at: int) -> None:
        self._send(self._forge(at))

    @rule(
        node=st.sampled_from(HONEST),
        steps=st.lists(STEPS, min_size=1, max_size=3),
        attempt=ATTEMPTS,
        permit=PERMITS,
        at=st.none() | st.integers(0, 2),
    )
    def send_steps(self, node: str, steps: list[Step], attempt: int, permit: Any, at: int | None) -> None:
        for step in steps:
            step.attempt = attempt
            if permit:
                step.permit.CopyFrom(permit)
            self.world.aim(step, at)
        self._send(self.world.liar.steps(node, steps))

    @rule(
        node=st.sampled_from(HONEST),
        parts=st.lists(PARTS, min_size=1, max_size=3),
        attempt=ATTEMPTS,
        at=st.none() | st.integers(0, 2),
    )
    def send_caches(self, node: str, parts: list[CachePart], attempt: int, at: int | None) -> None:
        for part in parts:
            part.attempt = attempt
            sessions = self.world.nodes.sessions.session_names()
            if at is not None and sessions:
                part.session = sessions[at % len(sessions)]
        self._send(self.world.liar.cache(node, parts))

    @rule(node=st.sampled_from(HONEST), data=st.data(), name=st.sampled_from(sorted(CALLS)))
    def call(self, node: str, data: st.DataObject, name: str) -> None:
        message: Message = data.draw(CALLS[name])
        self._send(self.world.liar.call(node, name, message))

    @rule(node=st.sampled_from(HONEST), path=st.sampled_from(NODE_CALLS), body=FRAMES)
    def send_bytes(self, node: str, path: str, body: bytes) -> None:
        self._send(self.world.liar.frame(node, path, body, 0.02))

    @rule()
    def request(self) -> None:
        self.world.run(self._request())

    @rule()
    def end_requests(self) -> None:
        self.world.run(self._end_requests())

    @rule(placement=st.sampled_from(WITHOUT) | st.sampled_from(WITH))
    def deploy(self, placement: tuple[str, ...]) -> None:
        self.world.run(self._deploy(placement))

    @rule()
    def exclude(self) -> None:
        self.world.run(self._exclude(), EXCLUDED_WITHIN_S + ANSWERED_WITHIN_S)

    @invariant()
    def private_blocks_stay_on_trusted_nodes(self) -> None:
        live = self.world.controller.live
        assert live is None or not any(live.placement[block] == MALLORY for block in PRIVATE)
        steps = self.world.mallory.steps()
        assert "int64" not in {step.values.dtype for step in steps}, "it got the ids of tokens"

    @invariant()
    def gateway_and_controller_run(self) -> None:
        assert self.world.run(self.world.failures()) == []

    def teardown(self) -> None:
        world = self.world
        world.run(self._end_requests())
        world.run(self._exclude(), EXCLUDED_WITHIN_S + ANSWERED_WITHIN_S)
        assert world.run(world.failures()) == []

    async def _forge(self, at: int) -> None:
        """Forge everything for a running session, while it goes on."""
        world = self.world
        if not world.nodes.sessions.session_names():
            await self._request()
        sessions, positions = world.nodes.sessions.session_names(), len(PROMPT) + NEW_TOKENS
        session, epoch = sessions[at % len(sessions)] if sessions else "", world.controller.deployment.live_number
        await forge_everything(session, epoch, positions, world.mallory, world.liar, HONEST)

    def _send(self, sending: Coroutine[Any, Any, Any]) -> None:
        """What the hostile member gets for it is its own affair."""
        with contextlib.suppress(GRPCError, OSError, StreamTerminatedError):
            self.world.run(sending)

    async def _request(self) -> None:
        """Begin a request, and wait until it has had a token or has ended."""
        history, begun = self.world.controller.deployment.history, asyncio.Event()

        async def answer() -> list[int]:
            try:
                tokens = []
                async for token in self.world.nodes.sessions.generate(generation_request(NEW_TOKENS)):
                    tokens.append(token.token_id)
                    begun.set()
                return tokens
            finally:
                begun.set()
                request.last = len(history)

        request = Request(asyncio.create_task(answer()), len(history))
        self.requests.append(request)
        await begun.wait()

    async def _end_requests(self) -> None:
        """All requests end; those that never ran through mallory with the tokens of the unsplit model."""
        for request in self.requests:
            outcome: object
            try:
                outcome = await request.answer
            except (ResplitError, TimeoutError) as error:
                outcome = error
            assert outcome == self.world.expected or self._ran_through_mallory(request)
        self.requests.clear()

    def _ran_through_mallory(self, request: Request) -> bool:
        epochs = self.world.controller.deployment.history[request.first - 1 : request.last]
        return any(MALLORY in epoch.placement for epoch in epochs)

    async def _deploy(self, placement: tuple[str, ...]) -> None:
        """Deploy a placement. One without mallory goes live in time, though a recovery may come first."""
        controller, refused = self.world.controller, True
        while refused:
            try:
                await controller.deploy(Proposal(placement, "re-split", controller.deployment.live_number))
                refused = False
            except ProposalRefusedError as error:
                refused = MALLORY not in placement
                assert not (refused and MALLORY in error.refused_by)  # noqa: PT017 - most refusals are right

    async def _exclude(self) -> None:
        """Drain mallory in time. From then on no request runs through it. Then let it join again."""
        world = self.world
        await asyncio.wait_for(world.operator.drain(MALLORY), EXCLUDED_WITHIN_S)
        before = set(world.nodes.sessions.session_names())
        world.mallory.heard.clear()
        assert await generate(world.nodes.sessions, generation_request(NEW_TOKENS)) == world.expected
        assert {step.session for step in world.mallory.steps()} <= before
        await world.operator.join(MALLORY)


@contextlib.asynccontextmanager
async def running(
    model: StoredModel, folder: Path, runner: asyncio.Runner, expected: list[int]
) -> AsyncIterator[World]:
    names = (*HONEST, MALLORY)
    config = three_node_config(nodes=[{"name": name, "memory": "8 MiB"} for name in names])
    mallory = HostileNode()
    async with in_process(config, model, folder, {MALLORY: mallory.service}) as nodes:
        controller, tasks = nodes.controller(), VitalTasks()
        watch = Monitor(nodes.router.peers, len(nodes.features), nodes.router.drop)
        nodes.router.on_heard = watch.heard
        tasks.spawn(watch.run(), "monitor")
        liar = HostileClient(nodes.addresses, folder / "keys" / MALLORY)
        controller.planner.set_problem(problem_of(config, nodes.features, WITHOUT[0]))
        operator = operator_of(nodes, controller)
        await controller.start()
        yield World(runner, nodes, controller, operator, tasks, mallory, liar, expected)
        mallory.lies.clear()
        await liar.disconnect()
        await tasks.stop()
        await controller.stop()


@pytest.fixture
def world(
    stored_model: StoredModel, tmp_path: Path, unsplit_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    for module, name, value in SHORT_LIMITS:
        monkeypatch.setattr(module, name, value)
    expected = reference(unsplit_model, list(PROMPT), NEW_TOKENS)
    with asyncio.Runner() as runner:
        context = running(stored_model, tmp_path, runner, expected)
        try:
            yield runner.run(context.__aenter__())
        finally:
            runner.run(context.__aexit__(None, None, None))


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # of messages that are long on purpose
def test_a_hostile_member_that_says_anything_at_any_moment_harms_nobody_else(world: World) -> None:
    class Machine(HostileMember):
        pass

    Machine.world = world
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=12,
            phases=[Phase.generate],  # real nodes do not repeat an example exactly, so a shorter one is not sought
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
