"""Planning ahead without nodes or a planner: what is planned when, and what nodes are told to keep for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from resplit.control.readiness import Readiness
from resplit.control.ready_plans import REST
from resplit.decide import Ready
from resplit.decide.likely import likely_changes
from resplit.epochs import Proposal
from resplit.errors import CapacityError, DataError
from resplit.model.source import StoredModel
from resplit.status import ReadinessStatus
from resplit.types import Problem
from resplit.wire.commands import Standby
from tests.support.in_process import until
from tests.support.latest_problem import problem_of
from tests.support.recording_control import RecordedDeployment
from tests.support.three_nodes import SPREAD, TURNED, A, B, C, three_node_config

WITHOUT_C = (A, A, B, B, B, B, B, A)
HOSTED = {node: tuple(block for block, host in enumerate(SPREAD) if host == node) for node in (A, B, C)}


class FixedPlanner:
    """Plans `placement` for each problem; or nothing, while `waiting` is not set."""

    def __init__(self) -> None:
        self.processor_s = 1.5
        self.placement: tuple[str, ...] | None = WITHOUT_C
        self.asked: list[Problem] = []
        self.waiting = asyncio.Event()
        self.waiting.set()
        self.stopped = False

    async def plan(self, problem: Problem) -> tuple[str, ...] | None:
        self.asked.append(problem)
        await self.waiting.wait()
        return self.placement

    async def stop(self) -> None:
        self.stopped = True


class Bench(RecordedDeployment):
    """Readiness over a real deployment; nodes, gateway and planner are stand-ins."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.readiness = Readiness(self.view, self.deployment, self.commands)
        self.planner = FixedPlanner()
        planner: Any = self.planner
        self.readiness.planner = planner
        self.readiness.pose = self.problem

    def problem(self) -> Problem | None:
        live = self.deployment.live
        return live and problem_of(self.view.cluster, self.view.rules.features, live.placement)

    @property
    def likely(self) -> tuple[str, ...]:
        """The likely changes of the live epoch, in words."""
        problem = self.problem()
        assert problem is not None
        return tuple(change.words for change in likely_changes(problem))

    async def start(self) -> None:
        await self.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0))
        self.tasks.spawn(self.readiness.run(), "readiness")

    async def planned(self, changes: int) -> None:
        """Have the readiness look, and wait until so many problems were planned in all."""
        self.readiness.look()
        await until(lambda: asyncio.sleep(0, len(self.planner.asked) == changes and not self.readiness.status().left))
        await asyncio.sleep(0.01)
        assert len(self.planner.asked) == changes

    def told(self) -> list[tuple[str, tuple[int, ...]]]:
        """The nodes that were told which blocks to keep since the last call."""
        standby = [(node, command) for node, command in self.commands.sent if isinstance(command, Standby)]
        assert all(set(command.shards) == set(command.blocks) for _, command in standby)
        self.commands.sent.clear()
        self.events.clear()
        return [(node, command.blocks) for node, command in standby]


@pytest.fixture
async def bench(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(stored_model, tmp_path)
    yield bench
    await bench.tasks.stop()


async def test_all_likely_changes_of_the_live_epoch_are_planned_for_in_their_order(bench: Bench) -> None:
    await bench.start()
    await bench.planned(len(bench.likely))
    assert bench.readiness.status() == ReadinessStatus(bench.likely, 0, 1.5)
    problem = bench.problem()
    assert problem is not None
    lost = [change.lost for change in likely_changes(problem)]
    dead = [bool((each.decode_s_per_token != each.decode_s_per_token).any()) for each in bench.planner.asked]
    assert dead == [node is not None for node in lost]


async def test_nothing_is_planned_before_the_first_epoch_or_without_a_problem_for_it(bench: Bench) -> None:
    bench.tasks.spawn(bench.readiness.run(), "readiness")
    await bench.planned(0)
    await bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0))
    bench.readiness.pose = lambda: None
    await bench.planned(0)
    outdated = problem_of(bench.view.cluster, bench.view.rules.features, TURNED)
    bench.readiness.pose = lambda: outdated
    await bench.planned(0)
    bench.readiness.pose = bench.problem
    await bench.planned(len(bench.likely))


async def test_plans_are_made_again_for_the_next_epoch_and_not_before(bench: Bench) -> None:
    await bench.start()
    first = len(bench.likely)
    await bench.planned(first)
    await bench.planned(first)
    await bench.deployment.deploy(Proposal(tuple(TURNED), "re-split", 1))
    await bench.planned(first + len(bench.likely))
    assert bench.readiness.status().changes == ("the way back", *bench.likely)
    assert bench.readiness.ready().placements == (tuple(SPREAD), WITHOUT_C)


async def test_the_way_back_is_to_the_placement_before_the_live_one(bench: Bench) -> None:
    await bench.start()
    bench.planner.placement = None
    for epoch, placement in enumerate([WITHOUT_C, (A,) * 8, tuple(TURNED)], start=1):
        await bench.deployment.deploy(Proposal(placement, "re-split", epoch))
    await bench.planned(len(bench.likely))
    assert bench.readiness.ready().placements == ((A,) * 8,)


async def test_what_is_ready_has_the_blocks_that_stand_by(bench: Bench) -> None:
    bench.readiness.standby = lambda: {A: (4, 5), C: (2,)}
    assert bench.readiness.ready() == Ready((), frozenset({(4, A), (5, A), (2, C)}))


async def test_the_plan_for_the_loss_of_a_node_holds_in_its_epoch_and_under_the_rules(bench: Bench) -> None:
    await bench.start()
    await bench.planned(len(bench.likely))
    assert bench.readiness.after_loss(1, [C]) == WITHOUT_C
    assert bench.readiness.after_loss(2, [C]) is None
    assert bench.readiness.after_loss(1, [B, C]) is None
    bench.view.adopt(three_node_config(), frozenset({B}), bench.view.addresses)
    assert bench.readiness.after_loss(1, [C]) is None
    bench.view.adopt(three_node_config(), frozenset(), bench.view.addresses)
    await bench.deployment.deploy(Proposal(tuple(TURNED), "re-split", 1))
    assert bench.readiness.after_loss(1, [C]) is None
    assert bench.readiness.ready().placements == ()


async def test_nodes_are_told_once_to_keep_what_they_host_and_what_plans_want(bench: Bench) -> None:
    await bench.start()
    bench.planner.waiting.clear()
    bench.readiness.look()
    await until(lambda: asyncio.sleep(0, bool(bench.planner.asked)))
    bench.told()
    bench.planner.waiting.set()
    await bench.planned(len(bench.likely))
    assert [event.split()[2] for event in bench.events if event.startswith("standby")] == ["1"] * 3
    assert bench.told() == [(A, HOSTED[A]), (B, (*HOSTED[B], 4, 5)), (C, HOSTED[C])]


async def test_a_node_that_refuses_is_told_again_after_the_next_plan(bench: Bench) -> None:
    await bench.start()
    bench.planner.placement = None  # there is nothing to keep but what they host
    bench.commands.answers["standby", B] = CapacityError("the disk is full")
    bench.told()
    await bench.planned(len(bench.likely))
    told = bench.told()
    assert told[:3] == [(node, HOSTED[node]) for node in (A, B, C)]
    assert told[3:] == [(B, HOSTED[B])] * (len(bench.likely) - 1)


async def test_a_node_that_answers_again_is_told_again(bench: Bench) -> None:
    await bench.start()
    await bench.planned(len(bench.likely))
    bench.told()
    bench.readiness.set_idle(False)
    bench.readiness.forget(C)
    bench.readiness.forget("stranger")
    await asyncio.sleep(0.01)
    assert bench.told() == [], "a decision goes first"
    bench.readiness.set_idle(True)
    await until(lambda: asyncio.sleep(0, any(event.startswith("standby") for event in bench.events)))
    assert bench.told() == [(C, HOSTED[C])]


async def test_nodes_are_told_nothing_while_nothing_was_planned(bench: Bench) -> None:
    bench.readiness.pose = lambda: None
    await bench.start()
    bench.readiness.forget(C)
    await bench.planned(0)
    assert bench.told() == []


async def test_nothing_is_planned_while_another_decision_is_made(bench: Bench) -> None:
    await bench.start()
    bench.readiness.set_idle(False)
    bench.readiness.look()
    await asyncio.sleep(0.01)
    assert bench.planner.asked == []
    bench.readiness.set_idle(True)
    await bench.planned(len(bench.likely))


async def test_a_problem_that_cannot_be_posed_ends_nothing(bench: Bench) -> None:
    def fail() -> Problem:
        raise DataError("there is no problem to plan with yet")

    await bench.start()
    bench.readiness.pose = fail
    await bench.planned(0)
    bench.readiness.pose = bench.problem
    await bench.planned(len(bench.likely))


async def test_after_a_plan_as_much_time_passes_as_it_took(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rests_s, sleep, loop = [], asyncio.sleep, asyncio.get_running_loop()

    async def note_rest(seconds: float) -> None:
        rests_s.append(seconds)
        await sleep(0)

    await bench.start()
    bench.planner.waiting.clear()
    bench.readiness.look()
    await until(lambda: asyncio.sleep(0, bool(bench.planner.asked)))
    begun_s = loop.time()
    await sleep(0.05)
    waited_s = loop.time() - begun_s
    monkeypatch.setattr(asyncio, "sleep", note_rest)
    bench.planner.waiting.set()
    while not rests_s:
        await sleep(0)
    assert rests_s[0] >= REST * waited_s
    assert rests_s[0] < REST * (loop.time() - begun_s + 60)


async def test_the_planner_ends_with_the_readiness(bench: Bench) -> None:
    await bench.start()
    await bench.planned(len(bench.likely))
    assert not bench.planner.stopped
    await bench.tasks.stop()
    assert bench.planner.stopped


async def test_the_problem_of_a_plan_that_was_begun_for_an_older_epoch_is_dropped(bench: Bench) -> None:
    await bench.start()
    bench.planner.waiting.clear()
    bench.readiness.look()
    await until(lambda: asyncio.sleep(0, bool(bench.planner.asked)))
    await bench.deployment.deploy(Proposal(tuple(TURNED), "re-split", 1))
    bench.planner.waiting.set()
    await bench.planned(1 + len(bench.likely))
    assert bench.planner.asked[1].current == tuple(TURNED)
