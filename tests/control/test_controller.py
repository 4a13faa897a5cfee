"""The controller over real nodes: a placement goes live on all nodes or on none, and the log has every step."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from resplit.control.api import create_control_api
from resplit.control.controller import Controller
from resplit.control.log import EpochLog
from resplit.control.monitor import Monitor
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import ProposalRefusedError
from resplit.node.server import NodeService
from resplit.wire.node_pb2 import ReportReply
from tests.support.controllers import FIRST, LONG, SECOND, operator_of, placed, served, started, steps
from tests.support.in_process import InProcessCluster, deploy, until
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C


async def test_a_placement_goes_live_on_every_node_and_the_one_before_is_released(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    assert await placed(nodes) == {A: ([0, 1, 7], [1], []), B: ([2, 3, 6], [1], []), C: ([4, 5], [1], [])}
    before = await served(nodes)
    await deploy(controller, SECOND)

    async def released() -> bool:
        return steps(controller, 1)[-1] == "released"

    await until(released)
    assert await placed(nodes) == {A: ([0, 1, 7], [2], []), B: ([2, 5, 6], [2], []), C: ([3, 4], [2], [])}
    assert await served(nodes) == before
    assert steps(controller, 1) == ["proposed", "prepared", "committed", "released"]
    assert steps(controller, 2) == ["proposed", "prepared", "committed"]
    assert [epoch.placement for epoch in controller.deployment.history] == [tuple(FIRST), tuple(SECOND)]
    # Only missing blocks were fetched: one layer for each of two nodes.
    assert controller.deployment.history[1].loaded_bytes == 2 * nodes.features[2].weight_bytes


async def test_a_proposal_that_violates_a_rule_is_refused_before_it_is_logged(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    before = await placed(nodes)
    for placement, based_on, why in [
        (FIRST, 0, "planned against epoch 0, but 1 is live; plan again"),
        (FIRST[:-1], 1, "7 blocks placed, the model has 8"),
        (["nobody", *FIRST[1:]], 1, "block embed: no node is called 'nobody'"),
        ([A, C, *FIRST[2:]], 1, "block layer.0 is private and gamma is not trusted"),
    ]:
        with pytest.raises(ProposalRefusedError, match=why):
            await controller.deploy(Proposal(tuple(placement), "re-split", based_on))
    assert await placed(nodes) == before
    assert controller.log.next_epoch() == 2


async def assert_old_epoch_serves(nodes: InProcessCluster, controller: Controller, tokens: list[int]) -> None:
    assert steps(controller, 2) == ["proposed", "aborted"]
    assert await placed(nodes) == {A: ([0, 1, 7], [1], []), B: ([2, 3, 6], [1], []), C: ([4, 5], [1], [])}
    assert controller.live is not None
    assert controller.live.epoch == 1
    assert await served(nodes) == tokens


async def test_a_corrupt_shard_aborts_the_epoch_on_all_nodes_and_the_old_one_keeps_serving(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    tokens = await served(nodes)
    shard = nodes.folder / "registry" / nodes.keyring["layer.2"].shard
    sealed = shard.read_bytes()
    shard.write_bytes(bytes([sealed[0] ^ 1]) + sealed[1:])
    with pytest.raises(ProposalRefusedError, match=r"epoch 2 could not be prepared: gamma: .*shard .* is corrupt"):
        await deploy(controller, SECOND)
    await assert_old_epoch_serves(nodes, controller, tokens)
    shard.write_bytes(sealed)
    await deploy(controller, SECOND)
    assert await served(nodes) == tokens


async def test_a_node_without_room_aborts_the_epoch_on_all_nodes_and_the_old_one_keeps_serving(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    tokens = await served(nodes)
    with pytest.raises(ProposalRefusedError, match=r"epoch 2 could not be prepared: gamma: .* more than gamma has"):
        await deploy(controller, [A, A, C, C, C, C, C, A])
    await assert_old_epoch_serves(nodes, controller, tokens)


async def test_a_placement_that_does_not_fit_beside_the_old_one_is_staged_and_no_token_changes(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    tokens = await served(nodes, LONG)
    other = (A, A, C, C, B, B, B, A)
    streams = [asyncio.create_task(served(nodes, LONG)) for _ in range(3)]
    await until(lambda: started(nodes, 3))
    live = await controller.deploy(Proposal(other, "re-split", 1))
    assert live.staged
    assert (await nodes.state(C)).blocks == (2, 3)
    assert await asyncio.gather(*streams) == [tokens] * 3
    moves = [move for record in nodes.sessions.records(1) for move in record.moves]
    assert len(moves) == 3
    assert not any(move.replayed for move in moves)
    assert all(move.cache_bytes > 0 for move in moves)
    assert await placed(nodes) == {A: ([0, 1, 7], [2], []), B: ([4, 5, 6], [2], []), C: ([2, 3], [2], [])}


async def test_a_staged_move_that_fails_midway_is_recovered_and_its_streams_are_replayed(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    tokens = await served(nodes, LONG)
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    shard = nodes.folder / "registry" / nodes.keyring["layer.1"].shard
    sealed = shard.read_bytes()
    shard.write_bytes(bytes([sealed[0] ^ 1]) + sealed[1:])
    stream = asyncio.create_task(served(nodes, LONG))
    await until(lambda: started(nodes, 1))
    with pytest.raises(ProposalRefusedError, match=r"epoch 2 could not be prepared: gamma: .*shard .* is corrupt"):
        await controller.deploy(Proposal((A, A, C, C, B, B, B, A), "re-split", 1))
    shard.write_bytes(sealed)
    assert await stream == tokens
    assert controller.live is not None
    assert controller.live.epoch > 2
    decision = controller.log.decisions()[-1]
    assert decision.outcome is not None
    assert (decision.action, decision.outcome.deployed) == (RECOVER, controller.live.epoch)
    assert decision.reason.startswith("a staged move failed")


async def test_a_recovery_need_not_fit_beside_the_epoch_that_it_replaces(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    tokens = await served(nodes)
    await controller.deploy(Proposal((A, A, C, C, B, B, B, A), RECOVER, 1))
    assert (await nodes.state(C)).blocks == (2, 3)
    assert await served(nodes) == tokens


async def test_a_node_lost_while_the_disk_is_full_is_replaced_once_there_is_room(
    nodes: InProcessCluster, controller: Controller, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, SECOND))
    await deploy(controller, SECOND)
    stream = asyncio.create_task(served(nodes, LONG))
    await until(lambda: started(nodes, 1))

    with full_disk(0), capture_logs():  # pytest captures log lines in a file, which is full too
        await nodes.stop(C)
        await asyncio.sleep(1.5)
        assert controller.live is not None
        assert C in controller.live.placement

    assert len(await asyncio.wait_for(stream, 15)) == LONG.max_new_tokens
    assert C not in controller.live.placement


async def test_a_placement_on_a_lost_node_is_refused(nodes: InProcessCluster, controller: Controller) -> None:
    nodes.sessions.on_lost = lambda node: None
    await deploy(controller, [A, A, B, B, B, B, B, A])
    tokens = await served(nodes)
    await nodes.stop(C)

    async def noticed() -> bool:
        return nodes.router.listening == {A, B}

    await until(noticed)
    with pytest.raises(ProposalRefusedError, match="gamma cannot be reached"):
        await deploy(controller, FIRST)
    assert steps(controller, 2) == ["proposed", "aborted"]
    assert await served(nodes) == tokens
    await deploy(controller, [A, A, A, B, B, B, B, A])
    assert await served(nodes) == tokens


async def test_two_proposals_at_once_are_not_both_deployed(nodes: InProcessCluster, controller: Controller) -> None:
    both = await asyncio.gather(
        *(controller.deploy(Proposal(tuple(each), "initial", 0)) for each in (FIRST, SECOND)), return_exceptions=True
    )
    assert [type(each) for each in both].count(ProposalRefusedError) == 1
    assert len(controller.deployment.history) == 1


async def test_a_profile_times_the_blocks_that_each_node_may_hold_and_all_links(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await controller.membership.profile()
    kinds = {name: {row["kind"] for row in await nodes.rows(name, "blocks")} for name in (A, B, C)}
    assert kinds == {A: {"embed", "layer", "head"}, B: {"embed", "layer", "head"}, C: {"layer"}}
    pairs = {(row["node"], row["peer"]) for name in (A, B, C) for row in await nodes.rows(name, "links")}
    assert pairs == {(one, other) for one in (A, B, C) for other in (A, B, C) if one != other}
    assert await placed(nodes) == {name: ([], [], []) for name in (A, B, C)}


@pytest.mark.parametrize("body", ["[]", "{", "{}", '{"state": {}, "rows": {"secrets": []}}', "[" * 100_000])
async def test_a_node_with_a_bad_report_is_lost_with_the_reason_and_harms_nobody(
    nodes: InProcessCluster, controller: Controller, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    honest = NodeService.Report

    async def report(service: NodeService, stream: Any) -> None:
        if service._agent.name != C:
            return await honest(service, stream)
        await stream.recv_message()
        return await stream.send_message(ReportReply(body=body))

    monkeypatch.setattr(NodeService, "Report", report)
    await nodes.stop(C)
    await nodes.start(C)
    await deploy(controller, [A, A, B, B, B, B, B, A])
    monitor = Monitor(nodes.router.peers, 8)
    app = create_control_api(controller, operator_of(nodes, controller), monitor, "secret")
    headers = {"Authorization": "Bearer secret"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://control", headers=headers
    ) as client:
        polling = asyncio.create_task(monitor.run())
        tokens = await served(nodes, LONG)
        await until(lambda: _is_faulty(client))
        assert await served(nodes, LONG) == tokens
        assert not polling.done()
        shown = {node["node"]: node for node in (await client.get("/status")).json()["nodes"]}
        assert shown[C]["fault"].startswith("its report cannot be read")
        assert [shown[name]["answers"] for name in (A, B)] == [True, True]
        assert controller.deployment.live_number == 1
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)


async def _is_faulty(client: httpx.AsyncClient) -> bool:
    nodes = (await client.get("/status")).json()["nodes"]
    return any(node["fault"] and not node["answers"] for node in nodes)


async def test_a_controller_whose_log_is_an_older_copy_numbers_above_what_the_nodes_know(
    nodes: InProcessCluster, controller: Controller
) -> None:
    for placement in (FIRST, SECOND, FIRST):
        await deploy(controller, placement)
    tokens = await served(nodes)
    await controller.stop()
    await nodes.router.disconnect()
    older = EpochLog(nodes.folder / "older.db")
    for step in ("proposed", "prepared", "committed"):
        older.append(1, step, None if step == "prepared" else Proposal(tuple(FIRST), "initial", 0))
    nodes.start_gateway()
    nodes.router.connect(nodes.addresses)
    await nodes.router.wait_for({A, B, C}, 10)
    restored = nodes.controller(older)
    await restored.start()
    assert restored.deployment.live_number == 4
    assert await served(nodes) == tokens
    await restored.stop()


async def test_a_request_that_begins_while_a_node_is_welcomed_goes_on(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    tokens = await served(nodes, LONG)
    busy = controller.membership._commands._turns[B]
    async with busy:  # with an earlier command
        welcoming = asyncio.create_task(controller.membership.welcome(B))
        await until(lambda: asyncio.sleep(0, bool(busy._waiters)))
        stream = asyncio.create_task(served(nodes, LONG))
        await until(lambda: started(nodes, 1))
    await welcoming
    async with asyncio.timeout(10):
        assert await stream == tokens


async def test_a_node_that_is_welcomed_frees_what_it_holds_of_sessions_that_have_ended(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, FIRST)
    await nodes.permit(B, "of an earlier gateway", capacity=64)

    async def held() -> list[str]:
        replies = await controller.membership._commands.require(controller.membership._connects([B]), 1)
        return replies[B]["sessions"]

    assert await held() == ["of an earlier gateway"]
    await controller.membership.welcome(B)
    assert await held() == []


@pytest.mark.filterwarnings("error")
async def test_work_that_is_cancelled_before_it_starts_leaves_no_warning(controller: Controller) -> None:
    controller.deployment.on_live(LiveEpoch(1, 0.0, "start", (A, B, C), None, None, 0, 0.0))
    await controller.stop()
    gc.collect()
