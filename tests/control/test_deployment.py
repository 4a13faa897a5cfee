"""The life of an epoch, step by step, without nodes: what is on disk before what is sent, and what an error undoes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from resplit.control import deployment as deployment_module
from resplit.control.log import Aborted, Detail, Entry, EpochStep
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import (
    CapacityError,
    CommandRefusedError,
    NodeLostError,
    PeerFaultError,
    ProposalRefusedError,
    ShardError,
)
from resplit.model.source import StoredModel
from resplit.wire.commands import Abort, Clear, Commit, NodeCommand, Prepare, Recall, Release, Reply
from resplit.wire.routes import Route
from tests.support.in_process import until
from tests.support.recording_control import RecordedDeployment
from tests.support.three_nodes import SPREAD, TURNED, A, B, C, three_node_config

FULL = CommandRefusedError("insufficient_memory", "no room beside the old blocks")


class Bench(RecordedDeployment):
    """A deployment whose outages are counted."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.outages = 0
        self.commands.on_fault = self.gateway.lose
        self.deployment.on_outage = self._outage

    def _outage(self) -> None:
        self.outages += 1

    async def deploy(
        self,
        placement: list[str],
        action: str = "re-split",
        based_on: int | None = None,
        suspects: tuple[str, ...] = (),
    ) -> list[str]:
        """Deploy a placement; the events until everything has ended."""
        self.events.clear()
        number = self.deployment.live_number if based_on is None else based_on
        try:
            await self.deployment.deploy(Proposal(tuple(placement), action, number, 1.5, 1.25), suspects)
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return list(self.events)

    def steps(self, epoch: int) -> list[str]:
        return [entry.step for entry in self.log.steps(epoch)]

    def hang_in(self, kind: str, node: str) -> asyncio.Event:
        """Have a node answer commands of a kind only once the event is set that this returns."""
        answering, send = asyncio.Event(), self.commands.send

        async def send_and_wait(
            commands: Mapping[str, NodeCommand], epoch: int, within_s: Mapping[str, float] | None = None
        ) -> dict[str, Reply | BaseException]:
            answers = await send(commands, epoch, within_s)
            if node in commands and commands[node].kind == kind:
                await answering.wait()
            return answers

        self.commands.send = send_and_wait  # type: ignore[method-assign]
        return answering

    async def until_sent(self, kind: str, node: str) -> None:
        await until(lambda: asyncio.sleep(0, any(event.startswith(f"{kind} {node} ") for event in self.events)))


@pytest.fixture
async def bench(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(stored_model, tmp_path)
    yield bench
    await bench.tasks.stop()


def full_at(bench: Bench, monkeypatch: pytest.MonkeyPatch, *steps: str) -> None:
    """Have the log find a full disk at these steps."""
    append = bench.log.append

    def append_or_refuse(epoch: int, step: EpochStep, detail: Detail | None = None) -> None:
        if step in steps:
            raise CapacityError("the disk is full")
        append(epoch, step, detail)

    monkeypatch.setattr(bench.log, "append", append_or_refuse)


async def test_each_step_is_on_disk_before_it_is_acted_on(bench: Bench) -> None:
    bench.gateway.oldest = 1
    events = await bench.deploy(SPREAD)
    assert events == [
        *(f"prepare {node} 1 (proposed)" for node in (A, B, C)),
        *(f"commit {node} 1 (None)" for node in (A, B, C)),
        "activate 1",
        *(f"release {node} 1 (None)" for node in (A, B, C)),
    ]
    proposal = Proposal(tuple(SPREAD), "re-split", 0, 1.5, 1.25)
    assert bench.log.steps(1) == [Entry("proposed", proposal), Entry("prepared"), Entry("committed", proposal)]
    assert bench.log.epochs.live == 1
    routes = [command.route for _, command in bench.commands.sent if isinstance(command, Prepare)]
    assert all(route.addresses == bench.view.addresses for route in routes)


async def test_each_command_names_the_epoch_that_it_is_about(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    bench.commands.sent.clear()
    bench.gateway.oldest = 2
    await bench.deploy(TURNED)
    await bench.deployment.recall([C, A, "stranger"])
    bench.commands.answers["prepare", B] = ShardError("the shard is corrupt")
    with pytest.raises(ProposalRefusedError):
        await bench.deploy(SPREAD)
    named = [(node, command) for node, command in bench.commands.sent if not isinstance(command, Prepare)]
    assert named == [
        *((node, Commit(2)) for node in (A, B, C)),
        *((node, Release(2)) for node in (A, B, C)),
        *((node, Recall(2)) for node in (A, C)),
        *((node, Abort(3)) for node in (A, B, C)),
    ]


async def test_nodes_that_do_not_answer_in_time_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment_module, "_ANSWER_WITHIN_S", 0.05)
    answered, notify = asyncio.Event(), bench.commands.notify

    async def notify_slowly(commands: Mapping[str, NodeCommand], epoch: int) -> None:
        if B in commands:
            await answered.wait()
        await notify(commands, epoch)

    monkeypatch.setattr(bench.commands, "notify", notify_slowly)
    assert await bench.deployment.tell({A: Release(1), B: Release(1), C: Release(1)}, 1) == [B]
    assert f"release {B} 1 (None)" not in bench.events
    answered.set()
    await until(lambda: asyncio.sleep(0, f"release {B} 1 (None)" in bench.events))


async def test_an_abort_does_not_wait_for_a_node_that_does_not_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "_OTHERS_ANSWER_WITHIN_S", 0.05)
    notify = bench.commands.notify

    async def notify_all_but_one(commands: Mapping[str, NodeCommand], epoch: int) -> None:
        if B in commands:
            await asyncio.Event().wait()
        await notify(commands, epoch)

    monkeypatch.setattr(bench.commands, "notify", notify_all_but_one)
    bench.commands.answers["prepare", A] = ShardError("the shard is corrupt")
    async with asyncio.timeout(30):
        with pytest.raises(ProposalRefusedError, match="the shard is corrupt"):
            await bench.deploy(SPREAD)
    assert bench.steps(1) == ["proposed", "aborted"]


async def test_an_epoch_that_is_proposed_ahead_is_prepared_at_once_and_goes_live_in_time(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    due_s = time.time() + 1.5
    ahead = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(TURNED), "re-split", 1, not_before_s=due_s)))
    await until(lambda: asyncio.sleep(0, f"prepare {C} 2 (proposed)" in bench.events))
    assert bench.steps(2) == ["proposed"]
    live = await ahead
    assert due_s <= live.committed_s < due_s + 5
    assert 0 <= live.prepare_s < 1.5  # the wait is no part of it
    assert bench.deployment.live_number == 2


async def test_an_epoch_whose_time_has_passed_goes_live_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s, sleep = [], asyncio.sleep

    async def note_sleep(seconds: float) -> None:
        waits_s.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note_sleep)
    await bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0, not_before_s=time.time() - 60))
    assert waits_s == [0.0]


async def test_an_epoch_that_is_proposed_ahead_gives_way_and_never_comes_hours_before_its_time(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    later_s = time.time() + 60
    ahead = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(TURNED), "re-split", 1, not_before_s=later_s)))
    await until(lambda: asyncio.sleep(0, f"prepare {C} 2 (proposed)" in bench.events))
    await bench.deploy(TURNED)
    with pytest.raises(ProposalRefusedError, match="a change that could not wait came meanwhile"):
        await ahead
    assert (bench.deployment.live_number, bench.steps(2)) == (3, ["proposed", "aborted"])
    with pytest.raises(ProposalRefusedError, match="more than 100 s before"):
        await bench.deployment.deploy(Proposal(tuple(SPREAD), "re-split", 3, not_before_s=time.time() + 3600))


async def test_a_proposal_that_gives_way_ends_no_other_and_is_planned_again_after_it(bench: Bench) -> None:
    answering = bench.hang_in("prepare", C)
    first, second = (Proposal(tuple(placement), "re-split", 0) for placement in (SPREAD, TURNED))
    deploying = asyncio.create_task(bench.deployment.deploy(first, gives_way=True))
    await bench.until_sent("prepare", C)
    waiting = asyncio.create_task(bench.deployment.deploy(second, gives_way=True))
    await asyncio.sleep(0.01)
    answering.set()
    assert (await deploying).placement == first.placement
    with pytest.raises(ProposalRefusedError, match="planned against epoch 0, but 1 is live"):
        await waiting


async def test_a_proposal_that_gives_way_is_refused_once_one_comes_that_does_not(bench: Bench) -> None:
    answering = bench.hang_in("prepare", C)
    deploying = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(SPREAD), "re-split", 0), gives_way=True))
    await bench.until_sent("prepare", C)
    recovering = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(TURNED), RECOVER, 0)))
    with pytest.raises(ProposalRefusedError, match="a change that could not wait came meanwhile"):
        await asyncio.wait_for(deploying, 30)
    answering.set()
    assert (await recovering).epoch == 2
    assert bench.steps(1) == ["proposed", "aborted"]


async def test_a_proposal_that_does_not_give_way_is_not_interrupted(bench: Bench) -> None:
    answering = bench.hang_in("prepare", C)
    deploying = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(SPREAD), "drain", 0)))
    await bench.until_sent("prepare", C)
    bench.deployment.interrupt()
    await asyncio.sleep(0.01)
    answering.set()
    assert (await deploying).epoch == 1


async def test_what_is_measured_while_an_epoch_is_prepared_is_disturbed(bench: Bench) -> None:
    assert bench.deployment.disturbed_until_s == -math.inf
    answering, begun_s = bench.hang_in("prepare", C), time.monotonic()
    deploying = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0)))
    await bench.until_sent("prepare", C)
    assert bench.deployment.disturbed_until_s == math.inf
    answering.set()
    await deploying
    assert begun_s < bench.deployment.disturbed_until_s <= time.monotonic()


async def test_whether_an_epoch_is_replaced_is_known_once_none_is_prepared(bench: Bench) -> None:
    assert not await bench.deployment.replaced(0)
    answering = bench.hang_in("prepare", C)
    deploying = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0)))
    await bench.until_sent("prepare", C)
    asking = asyncio.create_task(bench.deployment.replaced(0))
    await asyncio.sleep(0.01)
    assert not asking.done()
    answering.set()
    await deploying
    assert await asking
    assert not await bench.deployment.replaced(1)


async def test_a_rule_that_changes_while_an_epoch_is_prepared_refuses_it(bench: Bench) -> None:
    answering = bench.hang_in("prepare", C)
    deploying = asyncio.create_task(bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0)))
    await bench.until_sent("prepare", C)
    bench.view.adopt(three_node_config(trusted=[B]), frozenset(), bench.view.addresses)
    answering.set()
    with pytest.raises(ProposalRefusedError, match="block embed is private and alpha is not trusted"):
        await deploying
    assert bench.steps(1) == ["proposed", "aborted"]


async def test_trust_that_ends_while_an_epoch_goes_live_is_an_outage(bench: Bench) -> None:
    def activate(route: Route) -> None:
        bench.view.adopt(three_node_config(trusted=[B]), frozenset(), bench.view.addresses)

    bench.gateway.activate = activate  # type: ignore[method-assign]
    await bench.deploy(SPREAD)
    assert (bench.deployment.live_number, bench.outages) == (1, 1)


async def test_a_node_without_a_block_of_an_epoch_is_waited_for_only_a_moment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "_OTHERS_ANSWER_WITHIN_S", 0.05)
    bench.hang_in("prepare", C)
    async with asyncio.timeout(30):
        await bench.deploy(WITHOUT_C)
    assert bench.deployment.live_number == 1


async def test_a_full_disk_of_the_controller_refuses_an_epoch_and_blames_no_node(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        full_at(bench, patched, "prepared", "aborted")
        with pytest.raises(ProposalRefusedError, match="epoch 1 could not be prepared: the disk is full") as refusal:
            await bench.deploy(SPREAD)
    assert refusal.value.refused_by == frozenset()
    assert bench.steps(1) == ["proposed"]
    await bench.deploy(SPREAD)
    assert (bench.steps(1), bench.deployment.live_number) == (["proposed", "aborted"], 2)


async def test_a_release_that_cannot_be_logged_is_logged_by_the_next_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.gateway.oldest = 1
    await bench.deploy(SPREAD)
    await bench.deploy(TURNED)
    bench.gateway.oldest = 2
    with monkeypatch.context() as patched:
        full_at(bench, patched, "released")
        assert await bench.deployment.settle(1)
    assert bench.log.unreleased() == [1]
    assert await bench.deployment.settle(1)
    assert bench.log.unreleased() == []


async def test_an_epoch_in_which_a_session_is_left_is_not_released(bench: Bench) -> None:
    bench.gateway.oldest = 1
    for placement in (SPREAD, TURNED, SPREAD):
        await bench.deploy(placement)
    bench.deployment.sessions_left(2)
    await until(lambda: asyncio.sleep(0, bench.steps(1)[-1] == "released"))
    assert bench.log.unreleased() == [2]


async def test_each_epoch_that_goes_live_is_told_with_the_note_of_its_plan(bench: Bench) -> None:
    told: list[LiveEpoch] = []
    bench.deployment.on_live = told.append
    live = await bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0, note="no plan keeps max_utilization"))
    assert told == [live] == bench.deployment.history
    assert live.note == "no plan keeps max_utilization"


async def test_a_host_that_does_not_say_what_it_loaded_has_loaded_nothing(bench: Bench) -> None:
    bench.commands.answers |= {("prepare", node): {} for node in (A, B, C)}
    await bench.deploy(SPREAD)
    assert bench.deployment.history[-1].loaded_bytes == 0


async def test_a_live_epoch_records_what_was_loaded_and_predicted(bench: Bench) -> None:
    await bench.deploy(SPREAD, "initial")
    (live,) = bench.deployment.history
    assert (live.epoch, live.action, live.placement, live.staged) == (1, "initial", tuple(SPREAD), False)
    assert (live.predicted_latency_s, live.lower_bound) == (1.5, 1.25)
    weights = dict(enumerate(block.weight_bytes for block in bench.view.rules.features))
    assert live.loaded_bytes == sum(weights.values())
    by_node = [sum(weights[block] for block, host in enumerate(SPREAD) if host == node) for node in (A, B, C)]
    assert live.longest_load_bytes == max(by_node) < live.loaded_bytes
    assert 0 <= live.prepare_s < 60
    committed = bench.log.last_committed()
    assert committed is not None
    assert committed.placement == tuple(SPREAD)


async def test_blocks_that_a_new_host_had_loaded_before_are_told_apart_from_those_that_stayed(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    weights = [block.weight_bytes for block in bench.view.rules.features]
    came = {block for block, (old, new) in enumerate(zip(SPREAD, TURNED, strict=True)) if old != new}
    loaded = min(came)
    for node in (A, B, C):
        bench.commands.answers["prepare", node] = {"loaded": [loaded] if TURNED[loaded] == node else []}
    await bench.deploy(TURNED)
    live = bench.deployment.history[-1]
    assert live.loaded_bytes == weights[loaded]
    assert live.ready_bytes == sum(weights[block] for block in came - {loaded}) > 0


async def test_a_proposal_for_another_epoch_is_refused_before_anything_is_logged(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    for stale in (0, 2):
        with pytest.raises(ProposalRefusedError, match=f"^planned against epoch {stale}, but 1 is live; plan again$"):
            await bench.deploy(TURNED, based_on=stale)
        assert bench.events == []
    assert bench.log.next_epoch() == 2


async def test_a_placement_that_violates_a_rule_is_refused_before_anything_is_logged(bench: Bench) -> None:
    with pytest.raises(ProposalRefusedError, match="private and gamma is not trusted"):
        await bench.deploy([C, *SPREAD[1:]])
    assert (bench.events, bench.log.next_epoch()) == ([], 1)


async def test_an_unreachable_node_of_the_placement_aborts_the_epoch(bench: Bench) -> None:
    bench.gateway.connected = {A, B}
    with pytest.raises(ProposalRefusedError, match="epoch 1 could not be prepared: gamma cannot be reached"):
        await bench.deploy(SPREAD)
    assert bench.events == [f"abort {node} 1 (None)" for node in (A, B)]
    assert bench.steps(1) == ["proposed", "aborted"]
    assert bench.deployment.live is None


async def test_if_one_node_cannot_prepare_all_nodes_abort_and_the_old_epoch_stays_live(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    bench.commands.answers["prepare", B] = ShardError("the shard is corrupt")
    with pytest.raises(ProposalRefusedError, match="epoch 2 could not be prepared: the shard is corrupt"):
        await bench.deploy(TURNED)
    assert [event for event in bench.events if not event.startswith("prepare")] == [
        f"abort {node} 2 (None)" for node in (A, B, C)
    ]
    assert bench.steps(2) == ["proposed", "aborted"]
    assert bench.log.steps(2)[1].detail == Aborted("the shard is corrupt")
    assert (bench.deployment.live_number, bench.deployment.broken, bench.outages) == (1, None, 0)


async def test_an_unexpected_error_aborts_the_epoch_and_is_raised_as_it_is(bench: Bench) -> None:
    bench.commands.answers["prepare", B] = KeyError("defect")
    with pytest.raises(KeyError):
        await bench.deploy(SPREAD)
    assert bench.steps(1) == ["proposed", "aborted"]


async def test_without_room_for_old_and_new_blocks_the_move_is_staged(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    bench.gateway.oldest = 2
    refusals = [FULL]
    answer = bench.commands._answer

    def full_at_first(node: str, command: Any) -> Any:
        return refusals.pop() if (command.kind, node) == ("prepare", C) and refusals else answer(node, command)

    bench.commands._answer = full_at_first  # type: ignore[method-assign]
    events = await bench.deploy(TURNED)
    recalls = [event for event in events if event.startswith("recall")]
    assert [event.split()[:3] for event in recalls] == [["recall", node, "2"] for node in (A, B, C)]
    assert [event for event in events if event not in recalls][3:10] == [
        "pause",
        f"clear {C} 2 (proposed)",
        "move all to 2",
        f"prepare {C} 2 (proposed)",
        *(f"commit {node} 2 (None)" for node in (A, B, C)),
    ]
    assert events.index("activate 2") < events.index("resume")
    prepares = [(node, command) for node, command in bench.commands.sent if isinstance(command, Prepare)][-4:]
    assert [(node, command.replace_current) for node, command in prepares] == [
        (A, False), (B, False), (C, False), (C, True),
    ]  # fmt: skip
    assert set(prepares[-1][1].shards) == set(prepares[-1][1].route.blocks_of(C))
    assert [command for _, command in bench.commands.sent if isinstance(command, Clear)] == [
        Clear(prepares[-1][1].route)
    ]
    assert bench.deployment.history[-1].staged
    assert bench.deployment.history[-1].loaded_bytes == sum(b.weight_bytes for b in bench.view.rules.features)


async def test_a_staged_move_that_fails_leaves_an_outage_with_its_reason(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    bench.commands.answers["prepare", C] = FULL
    with pytest.raises(ProposalRefusedError):
        await bench.deploy(TURNED)
    assert bench.deployment.broken is not None
    assert bench.deployment.broken.startswith("a staged move failed: ")
    assert (bench.deployment.live_number, bench.outages) == (1, 1)
    assert bench.steps(2) == ["proposed", "aborted"]
    assert bench.events.index(f"abort {A} 2 (None)") < bench.events.index("resume")
    del bench.commands.answers["prepare", C]
    await bench.deploy(TURNED)
    assert bench.deployment.broken is None


REFUSALS = [
    CommandRefusedError("privacy", "I will not"),
    ShardError("no shard for me"),
    CapacityError("no room"),
    FULL,
    PeerFaultError("gamma: its reply to 'prepare' cannot be read"),
    NodeLostError("gamma does not answer"),
]
WITHOUT_C = [A, A, B, B, B, B, B, A]


@pytest.mark.parametrize("action", ["re-split", RECOVER])
@pytest.mark.parametrize("kind", ["prepare", "commit", "release", "abort"])
@pytest.mark.parametrize("answer", REFUSALS)
async def test_a_node_that_hosts_nothing_of_an_epoch_has_no_say_in_it(
    bench: Bench, action: str, kind: str, answer: Exception
) -> None:
    await bench.deploy(SPREAD)
    bench.commands.answers[kind, C] = answer
    await bench.deploy(WITHOUT_C, action)
    assert (bench.deployment.live_number, bench.deployment.broken) == (2, None)
    assert not bench.deployment.history[-1].staged


@pytest.mark.parametrize(
    ("answer", "is_fault"),
    [
        (CommandRefusedError("privacy", "I will not"), True),
        (ShardError("no shard for me"), True),
        (CommandRefusedError("stale", "my epoch is later"), False),
        (CommandRefusedError("unprepared", "I was absent"), False),
        (NodeLostError("gamma does not answer"), False),
    ],
)
async def test_a_node_that_refuses_what_does_not_concern_it_is_faulty(
    bench: Bench, answer: Exception, is_fault: bool
) -> None:
    bench.commands.answers["prepare", C] = answer
    await bench.deploy(WITHOUT_C)
    assert list(bench.commands.faults) == ([C] if is_fault else [])


async def test_a_host_that_refuses_to_serve_what_it_prepared_is_faulty_and_leaves_an_outage(bench: Bench) -> None:
    bench.commands.answers["commit", C] = CommandRefusedError("unprepared", "what epoch?")
    await bench.deploy(SPREAD)
    assert "does not serve epoch 1, which it prepared" in bench.commands.faults[C]
    assert (bench.deployment.live_number, bench.outages) == (1, 1)


@pytest.mark.parametrize("answer", REFUSALS)
async def test_the_nodes_that_did_not_prepare_an_epoch_are_named(bench: Bench, answer: Exception) -> None:
    bench.commands.answers["prepare", C] = answer
    with pytest.raises(ProposalRefusedError) as refusal:
        await bench.deploy(SPREAD)
    assert refusal.value.refused_by == {C}


async def test_a_host_that_says_that_it_loaded_blocks_of_others_is_not_believed(bench: Bench) -> None:
    bench.commands.answers["prepare", C] = {"loaded": [0, 4, 9999]}
    await bench.deploy(SPREAD)
    others = sum(block.weight_bytes for index, block in enumerate(bench.view.rules.features) if index != 5)
    assert bench.deployment.history[-1].loaded_bytes == others


async def test_a_suspect_gets_less_time_to_prepare(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    assert bench.commands.limits_s == []
    await bench.deploy(TURNED, "obey", suspects=(C,))
    assert bench.commands.limits_s == [{C: 10.0}]


async def test_a_recovery_replaces_the_live_blocks_and_its_failure_leaves_an_outage(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    bench.commands.answers["prepare", A] = CapacityError("the disk is full")
    with pytest.raises(ProposalRefusedError):
        await bench.deploy(TURNED, RECOVER)
    assert all(c.replace_current for _, c in bench.commands.sent[-6:] if isinstance(c, Prepare))
    assert bench.deployment.broken == "the disk is full"


async def test_a_node_lost_during_the_deployment_is_an_outage(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    assert bench.outages == 0
    bench.gateway.activate = lambda route: bench.gateway.connected.discard(C)  # type: ignore[method-assign]
    await bench.deploy(TURNED)
    assert (bench.deployment.live_number, bench.outages) == (2, 1)


async def test_earlier_epochs_are_released_once_no_session_uses_them(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    bench.gateway.oldest = 1
    await bench.deploy(TURNED)
    bench.events.clear()
    bench.deployment.sessions_left(1)
    await asyncio.sleep(0.01)
    assert bench.log.unreleased() == [1]
    bench.gateway.oldest = 2
    for _ in range(2):
        bench.deployment.sessions_left(2)
        await asyncio.sleep(0.01)
    assert [event for event in bench.events if event.endswith(" 2 (None)")] == [
        f"release {node} 2 (None)" for node in (A, B, C)
    ]
    assert (bench.log.unreleased(), bench.steps(1)[-1]) == ([], "released")


async def test_sessions_in_an_epoch_that_is_not_live_release_nothing(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    bench.events.clear()
    bench.deployment.sessions_left(2)
    await asyncio.sleep(0.01)
    assert bench.events == []


async def test_settling_waits_until_every_session_is_in_the_live_epoch(bench: Bench) -> None:
    bench.gateway.oldest = 1
    await bench.deploy(SPREAD)
    await bench.deploy(TURNED)
    assert not await bench.deployment.settle(0.01)
    settling = asyncio.create_task(bench.deployment.settle(1))
    await asyncio.sleep(0.01)
    assert not settling.done()
    bench.gateway.oldest = 2
    bench.deployment.sessions_left(2)
    assert await asyncio.wait_for(settling, 1)
    assert bench.log.unreleased() == []


async def test_an_epoch_that_an_earlier_controller_left_unfinished_is_aborted(bench: Bench) -> None:
    bench.log.append(1, "proposed")
    await bench.deployment.abort_unfinished()
    assert bench.steps(1) == ["proposed", "aborted"]
    assert bench.events == [f"abort {node} 1 (None)" for node in (A, B, C)]
    bench.log.append(2, "proposed")
    await bench.deploy(SPREAD)
    assert (bench.steps(2), bench.deployment.live_number) == (["proposed", "aborted"], 3)


async def test_a_returned_node_is_sent_the_outcomes_that_it_missed(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    await bench.deploy(TURNED)
    bench.events.clear()
    bench.commands.sent.clear()
    assert await bench.deployment.resync(B, reporting(_report(prepared=(2, 3)), _report(epochs=(2,))))
    assert bench.events == [f"commit {B} 2 (None)", f"abort {B} 3 (None)", f"release {B} 2 (None)"]
    assert bench.commands.sent == [(B, Commit(2)), (B, Abort(3)), (B, Release(bench.deployment._oldest_used))]


async def test_before_the_first_epoch_every_node_is_up_to_date(bench: Bench) -> None:
    assert await bench.deployment.resync(B, reporting(_report()))


async def test_a_node_that_returns_while_an_epoch_is_committed_is_sent_the_commit(bench: Bench) -> None:
    await bench.deploy(SPREAD)
    for step in ("proposed", "prepared", "committed"):  # the nodes have not answered yet
        bench.log.append(2, step)
    bench.events.clear()
    await bench.deployment.resync(B, reporting(_report(prepared=(2,)), _report(epochs=(1,))))
    assert bench.events[0] == f"commit {B} 2 (None)"


@pytest.mark.parametrize(
    ("node", "epochs", "up_to_date"),
    [(C, (1,), True), (C, (), False), (B, (), True), (C, (1, 9), False), (B, (9,), True)],
)
async def test_a_returned_host_is_up_to_date_with_the_live_epoch_and_none_after_it_and_others_always_are(
    bench: Bench, node: str, epochs: tuple[int, ...], up_to_date: bool
) -> None:
    await bench.deploy([A, A, A, C, C, A, A, A])
    assert await bench.deployment.resync(node, reporting(_report(), _report(epochs=epochs))) == up_to_date


async def test_a_returned_node_without_a_block_takes_part_in_the_live_epoch_again(bench: Bench) -> None:
    await bench.deploy([A, A, A, C, C, A, A, A])
    bench.events.clear()
    assert await bench.deployment.resync(B, reporting(_report(), _report(epochs=())))
    prepared = next(event for event in bench.events if event.startswith("prepare"))
    assert bench.events == [f"release {B} 1 (None)", prepared, f"commit {B} 1 (None)"]
    assert prepared.startswith(f"prepare {B} 1")
    (_, prepare), (_, commit) = bench.commands.sent[-2:]
    assert isinstance(prepare, Prepare)
    assert (prepare.route, prepare.replace_current) == (bench.deployment.live, False)
    assert commit == Commit(1)


async def test_an_epoch_is_numbered_above_all_that_nodes_know(bench: Bench) -> None:
    bench.commands.obeyed = {A: 4, B: 9}
    await bench.deploy(SPREAD)
    assert (bench.deployment.live_number, bench.log.next_epoch()) == (10, 11)
    bench.commands.obeyed = {A: 4, B: 9}
    await bench.deploy(TURNED)
    assert bench.deployment.live_number == 11


@pytest.mark.parametrize("lie", [2**53 - 1, 1_000_002])
async def test_a_node_that_claims_an_absurd_epoch_is_faulty_and_changes_no_number(bench: Bench, lie: int) -> None:
    bench.commands.obeyed = {A: 5, C: lie}
    await bench.deploy([A, A, B, B, B, B, B, A])
    assert bench.deployment.live_number == 6
    assert list(bench.commands.faults) == [C]
    assert f"obeyed epoch {lie}" in bench.commands.faults[C]
    bench.commands.obeyed = {A: 1_000_007}
    await bench.deploy([A, A, B, B, B, B, B, A])
    assert bench.deployment.live_number == 1_000_008


def reporting(*reports: Any) -> Any:
    """A peer that gives these reports, one after the other."""
    given = iter(reports)

    class Peer:
        async def report(self, after: int) -> tuple[Any, int]:
            assert after == 0
            return next(given), 0

    return Peer()


def _report(prepared: tuple[int, ...] = (), epochs: tuple[int, ...] = ()) -> Any:
    class State:
        pass

    report, state = State(), State()
    state.prepared, state.epochs = prepared, epochs  # type: ignore[attr-defined]
    report.state = state  # type: ignore[attr-defined]
    return report
