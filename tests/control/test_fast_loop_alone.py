"""The fast loop without nodes or a planner: what it shows the detector, what it asks a policy, what it does."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resplit.control import fast_loop as fast_loop_module
from resplit.control.fast_loop import MOST_PLANS, FastLoop, concern_links
from resplit.control.move_history import Moves
from resplit.control.planning import DEMAND_WINDOW_S
from resplit.decide import Decision, Ready, Settings, registry_bytes_per_s
from resplit.epochs import Proposal
from resplit.errors import DataError
from resplit.estimate import Change, Forecast, LinkSeen, NodeSeen, Observation
from resplit.model.source import StoredModel
from resplit.pass_times import PassTime
from resplit.policies import Occasion, Situation
from resplit.policies.base import keep, move
from resplit.telemetry.rows import LinkRow, NodeRow, TelemetryRows
from resplit.types import Problem
from resplit.wire.commands import Recall
from tests.support.constant_passes import constant_model
from tests.support.in_process import until
from tests.support.latest_problem import problem_of
from tests.support.recording_control import RecordedDeployment
from tests.support.three_nodes import SPREAD, TURNED, A, B, C, three_node_config

SLOWER = Change(0.0, B, "time", 1.0, 9.0, 0.1)
FASTER = Change(0.0, A, "time", 1.0, 0.5, 0.2)
WORSE_LINK = Change(0.0, f"the latency from {A} to {B}", "time", 1.0, 9.0, 0.3)
SETTINGS = Settings(cooldown_s=77.0, horizon_s=600.0)
RATES = {"chat": Forecast(3.0, 0.5)}


class Answers:
    """A policy that gives the answers that a test names: placements, or None to keep. It remembers the situations."""

    asked: frozenset[Occasion] = frozenset({"change"})

    def __init__(self, *placements: Sequence[str] | None) -> None:
        self.placements = list(placements)
        self.situations: list[Situation] = []
        self.rngs: list[np.random.Generator] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        self.situations.append(situation)
        self.rngs.append(rng)
        self.meanwhile()
        placement = self.placements.pop(0) if self.placements else None
        return move(situation, tuple(placement), "as told") if placement else keep(situation, "as told")


class FixedReadiness:
    """Is ready with `placements`; `calls` has what it was told."""

    def __init__(self) -> None:
        self.pose: Callable[[], Problem | None] = lambda: None
        self.placements: tuple[tuple[str, ...], ...] = ()
        self.calls: list[object] = []

    def look(self) -> None:
        self.calls.append("look")

    def set_idle(self, idle: bool) -> None:
        self.calls.append(idle)

    def ready(self) -> Ready:
        return Ready(self.placements)


class FixedPlanner:
    """Has a present problem, unless there is an `error`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.windows_s: list[float] = []
        self.error: Exception | None = None

    def present_problem(self, current: tuple[str, ...], window_s: float) -> Problem:
        self.windows_s.append(window_s)
        if self.error:
            raise self.error
        return replace(self.problem, current=current)


class Bench(RecordedDeployment):
    """A fast loop over a real deployment; nodes, gateway, planner, readiness and policy are stand-ins."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.gateway.expected = RATES
        self.planner = FixedPlanner(problem_of(self.view.cluster, self.view.rules.features, SPREAD))
        self.readiness = FixedReadiness()
        self.moves = Moves(folder / "history.json")
        planner: Any = self.planner
        readiness: Any = self.readiness
        self.loop = FastLoop(self.view, planner, self.deployment, readiness, self.log, self.moves, self.tasks)
        self.policy = Answers()

    async def start(self, *placements: Sequence[str] | None, settings: Settings = SETTINGS) -> None:
        """Deploy a placement, and run the loop, armed with a policy that gives these answers."""
        await self.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0))
        self.policy = Answers(*placements)
        self.loop.arm(self.policy, settings, 600.0)
        self.tasks.spawn(self.loop.run(), "fast loop")

    async def decided(self, *changes: Change, number: int = 1) -> Decision:
        """The last decision of `number`, after these changes."""
        self.loop._note(changes)
        await until(lambda: asyncio.sleep(0, len(self.log.decisions()) == number))
        return self.log.decisions()[-1]

    def undisturbed(self) -> None:
        self.deployment._disturbed_until_s = -math.inf


@pytest.fixture
async def bench(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(stored_model, tmp_path)
    yield bench
    await bench.tasks.stop()


def node_row(node: str, cpu: float, own: float, reference_s: float) -> NodeRow:
    return NodeRow(0.0, node, cpu, own, 1e6, 0.0, math.nan, reference_s, emulated=True)


def shown(bench: Bench) -> list[Observation]:
    """What the detector was shown after the cost model."""
    return list(bench.loop.recording().observations[1:])


async def test_a_move_is_deployed_and_logged_with_what_caused_it(bench: Bench) -> None:
    await bench.start(TURNED)
    begun_s, begun_clock_s = time.time(), time.monotonic()
    decision = await bench.decided(SLOWER, FASTER)
    took_s = time.monotonic() - begun_clock_s
    assert (decision.action, decision.reason) == ("re-split", "as told")
    assert begun_s <= decision.at_s <= time.time()
    assert (decision.seen, decision.deviations) == ((str(SLOWER), str(FASTER)), (0.1, 0.2))
    outcome = decision.outcome
    assert outcome is not None
    assert (outcome.deployed, outcome.refused) == (2, None)
    assert outcome.plan_s is not None
    assert outcome.prepare_s is not None
    assert bench.deployment.history[-1].prepare_s <= outcome.prepare_s <= took_s
    assert 0 < outcome.plan_s <= took_s - outcome.prepare_s
    assert bench.deployment.history[-1].placement == tuple(TURNED)
    last = bench.moves.history.last
    assert last is not None
    assert (last.at_s, last.before, last.after) == (
        bench.deployment.history[-1].committed_s, tuple(SPREAD), tuple(TURNED)
    )  # fmt: skip
    assert list(bench.loop.posed) == [2]
    assert bench.loop.posed[2].current == tuple(SPREAD)


async def test_passes_at_nodes_that_became_slower_are_recalled_after_a_move(bench: Bench) -> None:
    await bench.start(TURNED)
    await bench.decided(SLOWER, FASTER)
    await until(lambda: asyncio.sleep(0, any(isinstance(command, Recall) for _, command in bench.commands.sent)))
    assert [(node, each) for node, each in bench.commands.sent if isinstance(each, Recall)] == [(B, Recall(2))]


async def test_a_decision_to_keep_deploys_and_recalls_nothing(bench: Bench) -> None:
    await bench.start(None)
    decision = await bench.decided(SLOWER)
    assert decision.action == "keep"
    outcome = decision.outcome
    assert outcome is not None
    assert (outcome.deployed, outcome.refused) == (None, None)
    assert bench.deployment.live_number == 1
    assert not [command for _, command in bench.commands.sent if isinstance(command, Recall)]
    assert bench.loop.posed == {}


async def test_a_policy_is_told_all_that_is_known_at_the_change(bench: Bench) -> None:
    model = constant_model()
    bench.loop.set_model(model)
    bench.readiness.placements = (tuple(TURNED),)
    await bench.start(None, None)
    decision = await bench.decided(SLOWER)
    (situation,) = bench.policy.situations
    assert situation.now_s == decision.at_s
    assert situation.problem.current == tuple(SPREAD)
    assert situation.changes == (SLOWER,)
    assert situation.history is bench.moves.history
    assert situation.uncertainty == model.uncertainty
    assert situation.ready == Ready((tuple(TURNED),))
    assert situation.ahead is not None
    assert [each.rate_rps for each in situation.ahead.classes] == [RATES["chat"].cautious]
    assert set(bench.planner.windows_s) == {DEMAND_WINDOW_S}
    await bench.decided(FASTER, number=2)
    assert bench.policy.rngs[0] is bench.policy.rngs[1]


async def test_a_policy_has_no_cooldown_at_a_change_and_little_time_where_plans_are_ready(bench: Bench) -> None:
    await bench.start(None, None)
    await bench.decided(SLOWER)
    bench.readiness.placements = (tuple(TURNED),)
    await bench.decided(FASTER, number=2)
    first, second = (situation.settings for situation in bench.policy.situations)
    pace = registry_bytes_per_s(bench.deployment.history)
    assert pace is not None
    assert first == replace(SETTINGS, cooldown_s=0.0, time_limit_s=0.15, registry_bytes_per_s=pace)
    assert second == replace(first, time_limit_s=0.04)


async def test_a_policy_has_its_cooldown_after_many_moves(bench: Bench) -> None:
    await bench.start(None)
    bench.deployment.history += bench.deployment.history * 5
    await bench.decided(SLOWER)
    assert bench.policy.situations[0].settings.cooldown_s == SETTINGS.cooldown_s


async def test_changes_that_are_detected_while_a_plan_is_made_are_planned_for_with_it(bench: Bench) -> None:
    await bench.start(None)
    more = [FASTER]
    bench.policy.meanwhile = lambda: bench.loop._changes.extend([more.pop()] if more else [])
    decision = await bench.decided(SLOWER)
    assert [situation.changes for situation in bench.policy.situations] == [(SLOWER,), (SLOWER, FASTER)]
    assert decision.seen == (str(SLOWER), str(FASTER))


async def test_a_decision_is_planned_a_few_times_at_most(bench: Bench) -> None:
    await bench.start(None)
    bench.policy.meanwhile = lambda: bench.loop._changes.append(FASTER)
    await bench.decided(SLOWER)
    assert len(bench.policy.situations) == MOST_PLANS
    assert bench.loop._changes == [FASTER]


async def test_a_move_away_from_a_link_waits_for_the_measurements_of_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[bool] = []

    async def note_wait(changed: asyncio.Event) -> None:
        waits.append(changed.is_set())

    monkeypatch.setattr(bench.loop.remeasurement, "until_doubts_end", note_wait)
    await bench.start(None, TURNED, SPREAD)
    await bench.decided(WORSE_LINK)
    await bench.decided(SLOWER, number=2)
    assert waits == []
    await bench.decided(SLOWER, WORSE_LINK, number=3)
    assert waits == [False]  # the event of the change that is decided on ends no wait


async def test_a_refused_move_is_decided_on_again_only_if_another_placement_is_live(bench: Bench) -> None:
    await bench.start([C, *SPREAD[1:]], TURNED)
    decision = await bench.decided(SLOWER)
    outcome = decision.outcome
    assert outcome is not None
    assert outcome.refused is not None
    assert "gamma is not trusted" in outcome.refused
    await asyncio.sleep(0.01)
    assert len(bench.policy.situations) == 1
    assert bench.moves.history.last is None


async def test_the_problems_of_the_latest_epochs_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_loop_module, "_PROBLEMS_KEPT", 2)
    await bench.start(TURNED, SPREAD, TURNED)
    for number in (1, 2, 3):
        await bench.decided(SLOWER, number=number)
    assert {epoch: posed.current for epoch, posed in bench.loop.posed.items()} == {3: tuple(TURNED), 4: tuple(SPREAD)}


async def test_nothing_is_planned_ahead_while_a_change_is_decided_on(bench: Bench) -> None:
    await bench.start(None)
    bench.readiness.calls.clear()
    bench.policy.meanwhile = lambda: bench.readiness.calls.append("decides")
    await bench.decided(SLOWER)
    await until(lambda: asyncio.sleep(0, len(bench.readiness.calls) == 4))
    assert bench.readiness.calls == [False, "decides", True, "look"]


async def test_a_change_without_a_problem_to_plan_with_ends_nothing(bench: Bench) -> None:
    await bench.start(None)
    bench.planner.error = DataError("there is no problem to plan with yet")
    bench.loop._note([SLOWER])
    await until(lambda: asyncio.sleep(0, bool(bench.planner.windows_s)))
    bench.planner.error = None
    assert (await bench.decided(FASTER)).seen == (str(FASTER),)


async def test_nothing_is_decided_before_the_first_epoch_or_after_the_loop_was_disarmed(bench: Bench) -> None:
    policy = Answers()
    bench.tasks.spawn(bench.loop.run(), "fast loop")
    bench.loop.arm(policy, SETTINGS, 600.0)
    bench.loop._note([SLOWER])
    await asyncio.sleep(0.01)
    await bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0))
    for for_s in (0.0, 1e-9):
        bench.loop.arm(policy, SETTINGS, for_s)
        bench.loop._note([SLOWER])
        await asyncio.sleep(0.01)
    assert policy.situations == []
    bench.loop.arm(policy, SETTINGS, 0.9)
    await bench.decided(FASTER)
    assert [situation.changes for situation in policy.situations] == [(FASTER,)]


async def test_what_was_detected_while_the_loop_was_not_armed_is_no_news(bench: Bench) -> None:
    await bench.start(None)
    bench.loop.arm(bench.policy, SETTINGS, 0.0)
    bench.loop._changes.append(SLOWER)
    bench.loop.arm(bench.policy, SETTINGS, 600.0)
    bench.loop._changes.append(FASTER)
    bench.loop.arm(bench.policy, SETTINGS, 600.0)  # the slow loop renews it
    assert (await bench.decided(WORSE_LINK)).seen == (str(FASTER), str(WORSE_LINK))


async def test_a_policy_that_is_not_asked_at_changes_keeps(bench: Bench) -> None:
    await bench.start(None)
    policy = Answers(TURNED)
    policy.asked = frozenset({"tick"})
    bench.loop.arm(policy, SETTINGS, 600.0)
    bench.loop._note([SLOWER])
    await asyncio.sleep(0.01)
    assert policy.situations == []
    assert bench.readiness.pose() is None


async def test_the_present_problem_is_posed_while_the_loop_is_armed(bench: Bench) -> None:
    assert bench.readiness.pose() is None
    bench.loop.arm(Answers(), SETTINGS, 600.0)
    assert bench.readiness.calls == ["look"]
    assert bench.readiness.pose() is None, "there is no live epoch"
    await bench.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0))
    posed = bench.readiness.pose()
    assert posed is not None
    assert posed.current == tuple(SPREAD)
    bench.loop.arm(Answers(), SETTINGS, 1e-9)
    await asyncio.sleep(0.001)
    assert bench.readiness.pose() is None


async def test_the_estimates_have_the_expected_rates(bench: Bench) -> None:
    assert bench.loop.estimates().rates_rps == RATES


async def test_the_newest_report_of_a_node_is_shown_with_the_share_that_others_use(bench: Bench) -> None:
    bench.loop.set_model(constant_model())
    begun_s = time.monotonic()
    rows = (node_row(A, 0.2, 0.1, 0.5), node_row(A, 0.9, 0.9, 0.6), node_row(A, 0.75, 0.5, 0.04))
    bench.loop.reported(TelemetryRows(nodes=rows), 0.0)
    (seen,) = shown(bench)
    assert seen.node == NodeSeen(A, 0.04, 0.25)
    assert begun_s <= seen.at_s <= time.monotonic()


async def test_a_node_that_is_doubted_is_asked_to_report_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(bench.loop.remeasurement, "of_node", asked.append)
    bench.loop.set_model(constant_model())
    for reference_s in (0.03, 0.03, 0.3):
        bench.loop.reported(TelemetryRows(nodes=(node_row(B, 0.0, 0.0, reference_s),)), 0.0)
    assert asked == [B]


async def test_probes_are_shown_with_the_time_at_which_they_were_made(bench: Bench) -> None:
    bench.loop.set_model(constant_model())
    probes = [LinkRow(at_s, A, B, 64.0, 0.002, "active", emulated=True) for at_s in (99.8, 90.0, 101.0)]
    others = [replace(probes[0], source="passive"), replace(probes[0], peer="stranger")]
    begun_s = time.monotonic()
    bench.loop.reported(TelemetryRows(links=(*probes, *others)), 100.0)
    took_s = time.monotonic() - begun_s
    seen = shown(bench)
    assert [each.link for each in seen] == [LinkSeen(A, B, 64.0, 0.002)] * 3
    ages_s = [begun_s - each.at_s for each in seen]
    assert ages_s == [pytest.approx(expected, abs=took_s + 1e-6) for expected in (0.2, 0.5, 0.0)]


async def test_probes_from_the_time_of_a_move_are_not_shown(bench: Bench) -> None:
    bench.loop.set_model(constant_model())
    probe = LinkRow(0.0, A, B, 64.0, 0.002, "active", emulated=True)
    bench.deployment._disturbed_until_s = time.monotonic() - 0.1
    bench.loop.reported(TelemetryRows(links=(probe,)), 0.0)
    assert shown(bench) == []
    bench.deployment._disturbed_until_s = time.monotonic() - 60
    bench.loop.reported(TelemetryRows(links=(probe,)), 0.0)
    assert len(shown(bench)) == 1


async def test_links_in_doubt_are_measured_in_both_directions(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    monkeypatch.setattr(bench.loop.remeasurement, "of_links", measured.append)
    monkeypatch.setattr(bench.loop._estimate.links, "doubted", lambda: [(A, B)])
    bench.loop.reported(TelemetryRows(), 0.0)
    monkeypatch.setattr(bench.loop._estimate, "suspects", lambda done: [(B, C)] if done.epoch == 1 else [])
    for epoch in (0, 1):
        bench.loop.passed(PassTime(epoch, 20, 1, time.monotonic(), 0.0, ()))
    assert measured == [[(A, B), (B, A)], [(B, C), (C, B)]]


async def test_a_pass_that_began_while_blocks_were_loaded_is_not_shown(bench: Bench) -> None:
    bench.loop.set_model(constant_model())
    bench.deployment._disturbed_until_s = 100.0
    passes = [PassTime(1, 20, 1, at_s, 2.0, ()) for at_s in (101.0, 102.0, 102.5)]
    for done in passes:
        bench.loop.passed(done)
    assert shown(bench) == [Observation(102.5, done=passes[-1])]


async def test_a_recording_is_of_this_cluster(bench: Bench) -> None:
    begun_s = time.monotonic()
    bench.loop.set_model(constant_model())
    recording = bench.loop.recording()
    assert (recording.features, recording.source) == (bench.view.rules.features, A)
    (seen,) = recording.observations
    assert seen.cost == constant_model()
    assert begun_s <= seen.at_s <= time.monotonic()


def test_a_change_concerns_links_unless_it_is_that_of_a_node(stored_model: StoredModel) -> None:
    posed = problem_of(three_node_config(), stored_model.features(1), SPREAD)
    assert not concern_links([SLOWER, FASTER], posed)
    assert concern_links([SLOWER, WORSE_LINK], posed)
