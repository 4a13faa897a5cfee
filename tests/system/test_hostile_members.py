"""One member that lies harms nobody else. All others are processes, and it has no credentials but its own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from resplit.model.activation import token_ids
from resplit.security.identity import CONTROLLER
from resplit.status import NodeStatus
from resplit.wire.node_pb2 import CommandReply, ReportReply, Step
from resplit.wire.tensors import to_wire
from tests.support.cluster import NODES, TRUSTED, reference
from tests.support.forgeries import forge_everything, forged_permit
from tests.support.hostile import NONSENSE_REPLIES, HostileNode, Lie, answers, draws, refuses
from tests.support.hostile_members import cluster_content, in_place_of, joined, speaking_as
from tests.support.in_process import until
from tests.support.processes import answering, kill, pause, poll_until, ready, resume
from tests.support.streams import PROMPTS, all_answers, expected_tokens, request_completion, stream

pytestmark = pytest.mark.processes

NEW_TOKENS = 48
LONG = 230  # tokens of an answer that takes about a second
MALLORY = "mallory"
HONEST = ("alpha", "alpha", "beta", "gamma", "gamma", "delta", "beta", "alpha")
TURNED = ("beta", "beta", "alpha", "delta", "gamma", "delta", "alpha", "beta")
PUBLIC_ON_MALLORY = ("alpha", "alpha", MALLORY, MALLORY, "gamma", "delta", "beta", "alpha")
PRIVATE_ON_MALLORY = (MALLORY, MALLORY, "beta", "gamma", "gamma", "delta", "beta", MALLORY)
# Each command of an operator waits for a faulty node for 10 s at most, in each of two steps.
EXCLUDED_WITHIN_S = 30.0
ROUNDS = 5  # of an attack on one answer
STREAMS = 10  # at most, until one runs for long enough to be attacked
POSITIONS = len(PROMPTS[0]) + LONG


@pytest.fixture(scope="module")
def expected(unsplit_model: torch.nn.Module) -> list[list[int]]:
    return expected_tokens(unsplit_model, NEW_TOKENS)


@pytest.fixture(scope="module")
def long_answer(unsplit_model: torch.nn.Module) -> list[int]:
    return reference(unsplit_model, PROMPTS[0], LONG)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[ControlClient]:
    with ControlClient(cluster.url, cluster.token) as client:
        yield client


@pytest.fixture
async def mallory(cluster: Cluster, client: ControlClient) -> AsyncIterator[HostileNode]:
    """A member that hosts nothing."""
    async with joined(cluster, client, [MALLORY]) as members:
        await place(client, HONEST)
        yield members[MALLORY]


async def place(client: ControlClient, placement: tuple[str, ...]) -> None:
    """Deploy a placement once all its nodes answer. On a busy machine one may be listed as lost for a moment."""

    def placed() -> bool:
        model = client.model()
        if model.placement != placement and not set(placement) & set(model.lost):
            with contextlib.suppress(ProposalRefusedError):
                client.propose(Proposal(placement, "re-split", model.epoch))
        return client.model().placement == placement

    await poll_until(placed)


async def serve_through(
    cluster: Cluster, client: ControlClient, placement: tuple[str, ...], member: HostileNode
) -> None:
    """Serve requests along a placement until `member` has run passes."""

    async def serves() -> bool:
        await place(client, placement)
        await all_answers(cluster, NEW_TOKENS)
        return bool(member.steps())

    await until(serves, 90.0)


async def epoch_of(client: ControlClient) -> int:
    return (await asyncio.to_thread(client.model)).epoch


async def nodes_of(client: ControlClient) -> dict[str, NodeStatus]:
    return {node.node: node for node in (await asyncio.to_thread(client.status)).nodes}


BAD_REPORTS = {
    "no-object": "[]",
    "half-object": "{",
    "empty": "{}",
    "unknown-table": '{"state": {}, "rows": {"secrets": []}}',
    "deep": "[" * 100_000,
}


async def test_a_bad_report_makes_its_node_lost_with_the_reason_and_touches_nobody_else(
    cluster: Cluster, client: ControlClient, expected: list[list[int]]
) -> None:
    async with joined(cluster, client, list(BAD_REPORTS)) as liars:
        await place(client, HONEST)
        epoch = await epoch_of(client)
        for name, body in BAD_REPORTS.items():
            liars[name].lies["Report"] = answers(ReportReply(body=body))
        faults: dict[str, str] = {}

        def all_lost() -> bool:
            nodes = client.status().nodes
            faults.update({node.node: node.fault for node in nodes if node.fault and not node.answers})
            return faults.keys() >= BAD_REPORTS.keys()

        await poll_until(all_lost)
        assert {fault.partition(": ")[0] for fault in faults.values()} == {"its report cannot be read"}
        assert await all_answers(cluster, NEW_TOKENS) == expected
        assert answering(client, *NODES)
        assert await epoch_of(client) == epoch


def distrust(cluster: Cluster, client: ControlClient) -> list[str]:
    return client.trust(MALLORY, False)


def drain(cluster: Cluster, client: ControlClient) -> list[str]:
    return client.drain(MALLORY)


def remove(cluster: Cluster, client: ControlClient) -> list[str]:
    return client.apply(cluster_content(cluster))


@pytest.mark.parametrize(
    ("exclude", "placement"), [(distrust, PRIVATE_ON_MALLORY), (drain, PUBLIC_ON_MALLORY), (remove, PUBLIC_ON_MALLORY)]
)
async def test_a_node_that_answers_commands_with_nonsense_is_excluded_in_time_and_gets_no_prompt_afterwards(
    cluster: Cluster,
    client: ControlClient,
    mallory: HostileNode,
    expected: list[list[int]],
    exclude: Callable[[Cluster, ControlClient], list[str]],
    placement: tuple[str, ...],
) -> None:
    await asyncio.to_thread(client.trust, MALLORY, placement[0] == MALLORY)
    await serve_through(cluster, client, placement, mallory)
    mallory.talk_nonsense()
    begun_s = time.monotonic()
    assert await asyncio.to_thread(exclude, cluster, client)
    assert time.monotonic() - begun_s < EXCLUDED_WITHIN_S
    mallory.heard.clear()
    assert await all_answers(cluster, NEW_TOKENS) == expected
    assert mallory.steps() == []
    assert MALLORY not in (await asyncio.to_thread(client.model)).placement


@contextlib.asynccontextmanager
async def the_only_trusted_node(client: ControlClient) -> AsyncIterator[None]:
    """Let no node but mallory hold private blocks until the end of the block."""
    await asyncio.to_thread(client.trust, MALLORY, True)
    for name in TRUSTED:
        await asyncio.to_thread(client.trust, name, False)
    try:
        yield
    finally:
        for name in TRUSTED:
            await asyncio.to_thread(client.trust, name, True)


async def test_from_the_moment_that_trust_ends_nothing_private_goes_to_a_node_even_if_no_other_may_take_its_place(
    cluster: Cluster, client: ControlClient, mallory: HostileNode
) -> None:
    async with the_only_trusted_node(client):
        await serve_through(cluster, client, PRIVATE_ON_MALLORY, mallory)
        mallory.lies["Command"] = answers(CommandReply(body="{}"))  # it says that it obeys, and does nothing
        mallory.heard.clear()
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            request = asyncio.create_task(stream(http, PROMPTS[0], LONG))
            await until(lambda: heard_prompts(mallory))
            distrusting = asyncio.create_task(asyncio.to_thread(client.trust, MALLORY, False))
            await poll_until(lambda: not ready(client))
            mallory.heard.clear()
            with pytest.raises(TimeoutError):  # it waits for an allowed placement
                await asyncio.wait_for(request, 1.0)
        assert not await heard_prompts(mallory)
        await asyncio.wait_for(distrusting, EXCLUDED_WITHIN_S)
        assert (await asyncio.to_thread(request_completion, cluster, 4)).status_code == 503
        assert not await heard_prompts(mallory)
    assert (await asyncio.to_thread(request_completion, cluster, 4)).status_code == 200


async def heard_prompts(member: HostileNode) -> bool:
    """Whether the gateway sent a step."""
    return any(step.segment == 0 for step in member.steps())


@pytest.mark.parametrize("lie", [draws(NONSENSE_REPLIES["Command"]), refuses()], ids=["nonsense", "refusal"])
async def test_a_node_that_hosts_nothing_vetoes_no_resplit_and_no_recovery(
    cluster: Cluster, client: ControlClient, mallory: HostileNode, expected: list[list[int]], lie: Lie
) -> None:
    without_gamma = tuple("delta" if name == "gamma" else name for name in HONEST)
    mallory.lies["Command"] = lie
    live = await asyncio.to_thread(client.propose, Proposal(without_gamma, "re-split", await epoch_of(client)))
    assert live.placement == without_gamma
    mallory.lies.clear()
    await place(client, HONEST)
    await poll_until(lambda: answering(client, MALLORY))
    mallory.lies["Command"] = lie
    pause(cluster, "gamma")
    try:
        assert await all_answers(cluster, NEW_TOKENS) == expected
        assert "gamma" not in (await asyncio.to_thread(client.model)).placement
    finally:
        resume(cluster, "gamma")
    await poll_until(lambda: answering(client, "gamma"))


async def test_a_member_outside_the_route_changes_nobodys_answer(
    cluster: Cluster, client: ControlClient, mallory: HostileNode, long_answer: list[int]
) -> None:
    before = await nodes_of(client)
    outlasted = False  # whether a stream ran for at least one round: on a busy machine it may be over before
    async with speaking_as(cluster, MALLORY) as liar, httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        for _ in range(STREAMS):
            await place(client, PUBLIC_ON_MALLORY)  # it knows a session that it has run passes of
            mallory.heard.clear()
            request = asyncio.create_task(stream(http, PROMPTS[0], LONG))
            await until(lambda: has_run_a_pass(mallory))
            await place(client, HONEST)
            await until(lambda: may_nothing(mallory))
            epoch, session = await epoch_of(client), mallory.steps()[0].session
            for _ in range(ROUNDS):
                await forge_everything(session, epoch, POSITIONS, mallory, liar, NODES)
                outlasted = outlasted or not request.done()
            assert await request == long_answer
            if outlasted:
                break
        assert outlasted
    await poll_until(lambda: all(refused(client, node, "unexpected", before) for node in HONEST))


async def has_run_a_pass(member: HostileNode) -> bool:
    return bool(member.steps())


async def may_nothing(member: HostileNode) -> bool:
    """Whether the session that it ran passes of has left it: until then it may send the caches of its blocks."""
    permits = member.heard_in("Permit")
    return bool(permits) and not permits[-1].epochs


async def test_guesses_sent_as_steps_teach_nothing_about_the_private_blocks(
    cluster: Cluster, client: ControlClient, mallory: HostileNode, long_answer: list[int]
) -> None:
    await serve_through(cluster, client, PUBLIC_ON_MALLORY, mallory)
    epoch, before = await epoch_of(client), await nodes_of(client)
    mallory.heard.clear()
    async with speaking_as(cluster, MALLORY) as liar, httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        request = asyncio.create_task(stream(http, PROMPTS[0], LONG))
        await until(lambda: heard_steps(mallory))
        running = mallory.steps()[0].session
        guesses = [
            Step(session=session, epoch=epoch, values=to_wire(token_ids([number])), gateway=CONTROLLER, permit=permit)
            for number in range(10)
            for session in (running, "made-up")
            for permit in (None, forged_permit(session, epoch, MALLORY, attempt=0))
        ]
        await liar.steps("alpha", guesses)
        outcome = await asyncio.gather(request, return_exceptions=True)
    results = [step for step in mallory.steps() if step.start == 0 or step.session == "made-up"]
    assert len(results) == 1, "it got more than the states of the prompt, which it has to compute with"
    assert outcome == [long_answer]
    await poll_until(lambda: refused(client, "alpha", "unexpected", before) == len(guesses))


async def heard_steps(member: HostileNode) -> bool:
    return bool(member.steps())


def refused(client: ControlClient, node: str, reason: str, before: dict[str, NodeStatus]) -> int:
    """How many messages a node has refused for this reason since `before`."""
    now = next(each for each in client.status().nodes if each.node == node)
    return now.refusals.get(reason, 0) - before[node].refusals.get(reason, 0)


async def test_a_controller_whose_log_is_an_older_copy_serves_beside_nodes_that_know_later_epochs(
    cluster: Cluster, client: ControlClient, tmp_path: Path, expected: list[list[int]]
) -> None:
    log, older = cluster.state / "epochs.db", tmp_path / "older.db"
    with contextlib.closing(sqlite3.connect(log)) as source, contextlib.closing(sqlite3.connect(older)) as target:
        source.backup(target)
    for placement in (TURNED, HONEST, TURNED):
        await place(client, placement)
    known = await epoch_of(client)
    kill(cluster, CONTROLLER)
    for file in cluster.state.glob("epochs.db*"):
        file.unlink()
    shutil.copy(older, log)
    start_process(cluster, CONTROLLER)
    await poll_until(lambda: ready(client))
    assert await epoch_of(client) == known + 1
    assert await all_answers(cluster, NEW_TOKENS) == expected


async def test_a_node_that_has_restarted_refuses_the_commands_of_before(
    cluster: Cluster, client: ControlClient
) -> None:
    recorder = HostileNode()
    kill(cluster, "gamma")
    async with in_place_of(cluster, "gamma", recorder):
        await until(lambda: connected(recorder))
    start_process(cluster, "gamma")
    await poll_until(lambda: answering_as(client, "gamma", cluster.processes["gamma"].pid))
    async with speaking_as(cluster, "delta") as liar:
        replies = [await liar.call("gamma", "Command", command) for command in recorder.heard_in("Command")]
    assert {reply.error_kind for reply in replies} == {"replayed"}


async def connected(member: HostileNode) -> bool:
    return "connect" in {command.kind for command in member.heard_in("Command")}


def answering_as(client: ControlClient, name: str, pid: int) -> bool:
    """Whether a node answers with the process `pid`."""
    return any((node.node, node.pid, node.answers) == (name, pid, True) for node in client.status().nodes)
