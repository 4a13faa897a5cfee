"""The fast loop over real nodes: a detected change is decided on and deployed, with the models of the slow loop."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest

from resplit import planner
from resplit.control.controller import Controller
from resplit.decide import Decision, History, PastMove, Settings
from resplit.errors import CapacityError
from resplit.policies import Occasion, Situation, make_policy
from resplit.telemetry.rows import LinkRow, NodeRow, TelemetryRows
from tests.support.constant_passes import LAYER_S, constant_model, serve
from tests.support.controllers import FIRST, SECOND, slow_to_prepare
from tests.support.in_process import InProcessCluster, deploy, until
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import B, C

SETTINGS = Settings(horizon_s=600.0, cooldown_s=1e6)
RESPLIT = make_policy("resplit")


@pytest.fixture
async def placed(nodes: InProcessCluster, controller: Controller) -> Controller:
    """A controller with a live epoch, the latest problem and its cost model; the fast loop runs and is not armed."""
    await asyncio.to_thread(planner.load)  # compiles its kernels
    problem = problem_of(nodes.config, nodes.features, FIRST)
    controller.planner.set_problem(problem)
    controller.fast_loop.set_model(constant_model())
    await deploy(controller, FIRST)
    controller.tasks.spawn(controller.fast_loop.run(), "fast loop")
    serve(controller, 10)
    return controller


def decisions(controller: Controller) -> list[Decision]:
    return [decision for decision in controller.log.decisions() if decision.seen]


async def test_a_node_that_becomes_slow_loses_its_blocks_at_once_whatever_the_cooldown(placed: Controller) -> None:
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
    serve(placed, 2, **{B: 50.0})
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    (decision,) = decisions(placed)
    assert decision.seen == ("beta became 50 times slower",)
    assert placed.live is not None
    assert decision.outcome is not None
    assert (placed.live.epoch, decision.outcome.deployed) == (2, 2)
    posed = placed.fast_loop.posed[2]  # the problem that the move solved
    assert (posed.current, list(placed.fast_loop.posed)) == (tuple(FIRST), [2])
    assert B not in placed.live.placement
    assert placed.moves.history.last is not None
    assert placed.moves.history.last.after == placed.live.placement


class Slow:
    """A policy that keeps, and thinks about it until it is told to answer."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"change"})

    def __init__(self) -> None:
        self.begun, self.answer, self.questions = threading.Event(), threading.Event(), 0

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        self.questions += 1
        self.begun.set()
        assert self.answer.wait(30)
        return make_policy("static").decide(situation, rng)


async def test_a_change_that_is_detected_while_another_one_is_decided_on_is_decided_on_with_it(
    placed: Controller,
) -> None:
    policy = Slow()
    placed.fast_loop.arm(policy, SETTINGS, 60.0)
    serve(placed, 2, **{B: 50.0})
    assert await asyncio.to_thread(policy.begun.wait, 30)
    serve(placed, 3, **{B: 50.0, C: 20.0})
    policy.answer.set()
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    (decision,) = decisions(placed)
    assert decision.seen == ("beta became 50 times slower", "gamma became 20 times slower")
    assert policy.questions == 2


class Overtaken:
    """`resplit`, but another placement goes live while it thinks about its first answer."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"change"})

    def __init__(self, controller: Controller, loop: asyncio.AbstractEventLoop) -> None:
        self._deploys: Callable[[], object] | None = lambda: asyncio.run_coroutine_threadsafe(
            deploy(controller, SECOND), loop
        ).result(30)

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        decision = RESPLIT.decide(situation, rng)
        if self._deploys is not None:
            overtake, self._deploys = self._deploys, None
            overtake()
        return decision


async def test_a_change_whose_move_was_overtaken_by_another_one_is_decided_on_again(placed: Controller) -> None:
    placed.fast_loop.arm(Overtaken(placed, asyncio.get_running_loop()), SETTINGS, 60.0)
    serve(placed, 2, **{B: 50.0})
    await until(lambda: asyncio.sleep(0, len(decisions(placed)) == 2), timeout_s=20)
    first, second = decisions(placed)
    assert first.outcome is not None
    assert first.outcome.refused is not None
    assert "planned against epoch 1, but 2 is live" in first.outcome.refused
    assert second.seen == first.seen
    assert placed.live is not None
    assert B not in placed.live.placement


async def test_a_change_is_not_decided_on_unless_the_slow_loop_armed_it(placed: Controller) -> None:
    serve(placed, 3, **{B: 50.0})
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)  # what was detected before is in the models of the slow loop
    await asyncio.sleep(0.2)
    placed.fast_loop.arm(RESPLIT, SETTINGS, 0.0)
    serve(placed, 3)
    await asyncio.sleep(0.2)
    assert decisions(placed) == []
    assert placed.fast_loop.estimates().nodes[B].factor == pytest.approx(1.0, rel=0.1)


async def test_a_small_change_is_decided_on_and_changes_nothing(placed: Controller) -> None:
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
    serve(placed, 3, **{B: 1.5})
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    assert decisions(placed)[0].action in {"keep", "re-split", "redistribute"}


async def test_an_unused_node_that_others_use_is_seen_by_its_reports(placed: Controller) -> None:
    def row(cpu: float) -> NodeRow:
        return NodeRow(0.0, "delta", cpu, 0.0, 1e6, 0.0, float("nan"), LAYER_S, emulated=True)

    for share in (0.0, 0.0, 0.7, 0.7):
        placed.fast_loop.reported(TelemetryRows(nodes=(row(share),)), 0.0)
    assert placed.fast_loop.estimates().nodes["delta"].background_utilization == pytest.approx(0.7, abs=0.02)


async def test_no_number_in_a_report_harms_the_estimates(placed: Controller) -> None:
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
    placed.deployment._disturbed_until_s = -math.inf
    numbers = (0.0, -1.0, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan)
    for one, other in itertools.product(numbers, repeat=2):
        node = NodeRow(0.0, "delta", one, other, one, one, one, other, emulated=True)
        links = [LinkRow(0.0, "delta", B, size, other, "active", emulated=True) for size in (64.0, one)]
        placed.fast_loop.reported(TelemetryRows(nodes=(node,), links=tuple(links)), 0.0)
    estimates = placed.fast_loop.estimates()
    delta, link = estimates.nodes["delta"], next(each for each in estimates.links if each.node == "delta")
    factors = (delta.factor, delta.background_utilization, link.latency_factor, link.s_per_byte_factor)
    assert all(math.isfinite(factor) and factor >= 0 for factor in factors)


async def test_the_history_of_moves_survives_a_restart(nodes: InProcessCluster, placed: Controller) -> None:
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
    serve(placed, 2, **{B: 50.0})
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    assert nodes.controller(placed.log).moves.history == placed.moves.history != History()


async def test_after_some_moves_in_a_short_time_the_cooldown_applies(placed: Controller) -> None:
    (live,) = placed.deployment.history
    placed.moves.set(History(PastMove(time.time(), "re-split", live.placement, live.placement, None, 1.0)))
    placed.deployment.history += [live, live]
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
    serve(placed, 2, **{B: 50.0})
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    assert decisions(placed)[0].action == "keep"
    assert "the last move was 0 s ago" in decisions(placed)[0].reason


async def test_a_defect_in_a_decision_ends_nothing(placed: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise ValueError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(placed.fast_loop, "_choose", defect)
        placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
        serve(placed, 2, **{B: 50.0})
        await asyncio.sleep(0.2)
    serve(placed, 3)
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    assert decisions(placed)[0].seen == ("beta became 50 times faster",)


async def test_on_a_full_disk_a_move_is_made_and_logged_and_only_a_restart_forgets_it(
    nodes: InProcessCluster, placed: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resplit.control.move_history.write_atomically", full)
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
    serve(placed, 2, **{B: 50.0})
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    assert placed.moves.history.last is not None
    with pytest.raises(CapacityError, match="No space left"):
        placed.moves.set(History())
    assert nodes.controller(placed.log).moves.history == History()


async def test_a_move_gives_way_to_a_change_that_cannot_wait(nodes: InProcessCluster, placed: Controller) -> None:
    preparing, go_on = slow_to_prepare(nodes)
    placed.fast_loop.arm(RESPLIT, SETTINGS, 60.0)
    serve(placed, 2, **{B: 50.0})
    async with asyncio.timeout(10):
        await preparing.wait()
    placed.deployment.interrupt()
    await until(lambda: asyncio.sleep(0, bool(decisions(placed))))
    go_on.set()
    outcome = decisions(placed)[0].outcome
    assert outcome is not None
    expected = "epoch 2 could not be prepared: a change that could not wait came meanwhile; plan again"
    assert outcome.refused == expected
    assert placed.moves.history == History()
