"""Recovery from an outage, and resumption after a restart, without nodes: what is planned, deployed, tried again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from resplit.control import recovery as recovery_module
from resplit.control.recovery import Recovery
from resplit.decide import Decision
from resplit.epochs import RECOVER, Proposal
from resplit.errors import CapacityError, InfeasibleError, ShardError
from resplit.model.source import StoredModel
from tests.support.in_process import until
from tests.support.recording_control import RecordedDeployment, RecordingPlanner
from tests.support.three_nodes import SPREAD, A, B, C, three_node_config

WITHOUT_C = (A, A, B, B, B, B, B, A)


class Bench(RecordedDeployment):
    """A recovery over a real deployment; nodes, gateway and planner are stand-ins."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.planner = RecordingPlanner(WITHOUT_C)
        planner: Any = self.planner
        self.recovery = Recovery(self.view, self.deployment, planner, self.log)

    async def start(self) -> None:
        await self.deployment.deploy(Proposal(tuple(SPREAD), "initial", 0, 1.5))

    @property
    def live(self) -> tuple[str, ...] | None:
        return self.deployment.live.placement if self.deployment.live else None


@pytest.fixture
async def bench(stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(recovery_module, "_RETURN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(recovery_module, "_RETRY_INTERVAL_S", 0.01)
    bench = Bench(stored_model, tmp_path)
    yield bench
    await bench.tasks.stop()


async def until_asked(bench: Bench, times: int) -> None:
    """Wait until that many plans were asked for."""

    async def are_asked() -> bool:
        return len(bench.planner.asked) >= times

    await until(are_asked)


async def test_while_the_live_epoch_can_serve_nothing_is_planned(bench: Bench) -> None:
    await bench.recovery.recover()
    await bench.start()
    await bench.recovery.recover()
    assert bench.planner.asked == []


async def test_after_a_loss_a_plan_for_the_other_nodes_goes_live_and_is_logged(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    bench.gateway.unavailable = "an earlier outage"
    await bench.recovery.recover()
    assert bench.planner.asked == [(tuple(SPREAD), 1)]
    assert (bench.live, bench.gateway.unavailable) == (WITHOUT_C, None)
    (decision,) = bench.log.decisions()
    assert (decision.action, decision.reason) == (RECOVER, "lost gamma")
    assert 0 <= time.time() - decision.at_s < 60
    outcome = decision.outcome
    assert outcome is not None
    assert outcome.deployed == 2
    assert outcome.plan_s is not None
    assert outcome.prepare_s is not None
    assert min(outcome.plan_s, outcome.prepare_s) >= 0


async def test_the_time_of_a_recovery_is_that_of_its_plan_and_that_of_its_epoch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    begun_and_ended_s = iter([100.0, 107.0])
    clock = SimpleNamespace(monotonic=lambda: next(begun_and_ended_s), time=time.time)
    monkeypatch.setattr(recovery_module, "time", clock)
    await bench.recovery.recover()
    outcome = bench.log.decisions()[0].outcome
    assert outcome is not None
    assert outcome.prepare_s == bench.deployment.history[-1].prepare_s > 0
    assert outcome.plan_s == pytest.approx(7.0 - outcome.prepare_s, abs=1e-9)


async def test_a_full_disk_keeps_the_decision_from_the_log_and_nothing_from_recovering(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(decision: Decision) -> None:
        raise CapacityError("the disk is full")

    await bench.start()
    bench.gateway.connected = {A, B}
    monkeypatch.setattr(bench.log, "append_decision", full)
    await bench.recovery.recover()
    assert bench.live == WITHOUT_C


async def test_the_decision_and_the_live_epoch_say_what_the_plan_does_not_keep(
    bench: Bench, stored_model: StoredModel, tmp_path: Path
) -> None:
    await bench.start()
    bench.gateway.connected, bench.planner.note = {A, B}, "no plan keeps max_utilization: alpha"
    await bench.recovery.recover()
    assert bench.deployment.history[-1].note == "no plan keeps max_utilization: alpha"
    assert bench.log.decisions()[-1].reason == "lost gamma; no plan keeps max_utilization: alpha"
    bench.log.close()
    restarted = Bench(stored_model, tmp_path)
    await restarted.recovery.resume()
    assert restarted.deployment.history[-1].note == "no plan keeps max_utilization: alpha"


async def test_a_failed_staged_move_is_recovered_from_although_all_nodes_answer(bench: Bench) -> None:
    await bench.start()
    bench.deployment.broken = "a staged move failed"
    await bench.recovery.recover()
    assert bench.live == WITHOUT_C
    assert bench.log.decisions()[0].reason == "a staged move failed"


async def test_a_lost_node_without_a_block_of_the_live_epoch_is_no_reason_for_a_recovery(bench: Bench) -> None:
    await bench.deployment.deploy(Proposal(WITHOUT_C, "initial", 0))
    bench.gateway.connected = {A, B}
    await bench.recovery.recover()
    assert bench.planner.asked == []
    bench.deployment.broken = "a staged move failed"
    await bench.recovery.recover()
    assert bench.log.decisions()[0].reason == "a staged move failed"


async def test_a_placement_that_violates_privacy_is_recovered_from(bench: Bench) -> None:
    await bench.start()
    bench.view.adopt(three_node_config(trusted=[B]), frozenset(), bench.view.addresses)
    bench.planner.placement = (B,) * 8
    await bench.recovery.recover()
    assert bench.live == (B,) * 8


async def test_without_a_possible_plan_requests_fail_with_the_reason(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected = {C}
    bench.planner.error = InfeasibleError("no trusted node is left")
    await bench.recovery.recover()
    assert bench.gateway.unavailable == "no trusted node is left"
    assert bench.log.decisions() == []


async def test_a_node_that_returns_while_no_plan_is_possible_is_planned_with(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected = {C}
    bench.planner.error = InfeasibleError("no trusted node is left")
    bench.recovery.node_returned()  # before the outage: it counts only for who waits then
    recovering = asyncio.create_task(bench.recovery.recover())
    await asyncio.sleep(0.01)
    assert len(bench.planner.asked) == 1
    bench.gateway.connected, bench.planner.error = {A, B, C}, None
    bench.recovery.node_returned()
    await recovering
    assert (bench.live, bench.gateway.unavailable) == (tuple(SPREAD), None)


async def test_a_placement_that_goes_live_while_no_plan_is_possible_serves(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    bench.planner.error = InfeasibleError("the latest problem is too large")
    recovering = asyncio.create_task(bench.recovery.recover())
    await until(lambda: was_asked(bench.planner))
    await bench.deployment.deploy(Proposal(WITHOUT_C, "re-split", 1))
    await recovering
    assert (bench.live, bench.gateway.unavailable) == (WITHOUT_C, None)


async def was_asked(planner: RecordingPlanner) -> bool:
    return bool(planner.asked)


async def test_a_node_that_answered_during_the_planning_is_planned_with_at_once(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected = {A, C}
    planned = bench.planner.plan

    async def returns_meanwhile(
        current: tuple[str, ...], based_on: int, action: str = RECOVER, avoid: frozenset[str] = frozenset()
    ) -> Proposal:
        if not bench.planner.asked:
            bench.planner.asked.append((current, based_on))
            bench.gateway.connected = {A, B}
            raise InfeasibleError("too little memory")
        return await planned(current, based_on, action, avoid)

    bench.planner.plan = returns_meanwhile  # type: ignore[method-assign]
    await bench.recovery.recover()
    assert bench.live == WITHOUT_C


async def test_a_refused_recovery_is_tried_again_and_after_a_while_requests_get_the_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    bench.commands.answers["prepare", B] = CapacityError("the disk is full")
    recovering = asyncio.create_task(bench.recovery.recover())
    await asyncio.sleep(0.05)
    assert len(bench.planner.asked) > 1
    assert bench.planner.avoided[:2] == [frozenset(), frozenset({B})]
    assert bench.gateway.unavailable is None, "requests wait at first"
    monkeypatch.setattr(recovery_module, "_UNAVAILABLE_AFTER_S", 0.0)
    await asyncio.sleep(0.05)
    assert bench.gateway.unavailable is not None
    assert bench.gateway.unavailable == "beta cannot prepare a placement; the log of the controller says why"
    bench.commands.answers.clear()
    await asyncio.wait_for(recovering, 2)
    assert (bench.live, bench.gateway.unavailable) == (WITHOUT_C, None)


async def test_a_recovery_avoids_all_nodes_that_have_refused(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    bench.planner.first = [(A,) * 8, (B,) * 8, (A,) * 8]
    for node in (A, B):
        bench.commands.answers["prepare", node] = CapacityError("the disk is full")
    recovering = asyncio.create_task(bench.recovery.recover())
    await until(lambda: asyncio.sleep(0, len(bench.planner.asked) > 3))
    bench.commands.answers.clear()
    await asyncio.wait_for(recovering, 10)
    assert bench.planner.avoided[:4] == [frozenset(), {A}, {A, B}, {A, B}]


def full_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first step that is written to the log find a full disk."""
    append, refusals = bench.log.append, [CapacityError("the disk is full")]

    def append_or_refuse(*step: Any) -> None:
        if refusals:
            raise refusals.pop()
        append(*step)

    monkeypatch.setattr(bench.log, "append", append_or_refuse)


async def test_a_full_disk_of_the_controller_is_no_reason_to_avoid_a_node(
    bench: Bench, stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    full_once(bench, monkeypatch)
    await asyncio.wait_for(bench.recovery.recover(), 10)
    assert (bench.live, bench.planner.avoided) == (WITHOUT_C, [frozenset(), frozenset()])
    bench.log.close()
    restarted = Bench(stored_model, tmp_path)
    full_once(restarted, monkeypatch)
    await restarted.recovery.resume()
    assert (restarted.live, restarted.planner.avoided) == (WITHOUT_C, [])


async def test_on_a_full_disk_one_line_names_the_file_and_requests_do_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    monkeypatch.setattr(recovery_module, "_UNAVAILABLE_AFTER_S", 0.0)
    with capture_logs() as lines, full_disk(0):
        recovering = asyncio.create_task(bench.recovery.recover())
        await until_asked(bench, 4)
        (line,) = [line for line in lines if line["log_level"] == "warning"]
    assert "epochs.db: cannot be written (disk I/O error)" in line["error"]
    assert bench.gateway.unavailable == "the controller cannot prepare a placement; the log of the controller says why"
    await asyncio.wait_for(recovering, 2)
    assert (bench.live, bench.gateway.unavailable) == (WITHOUT_C, None)


async def test_a_refused_recovery_is_tried_again_sooner_at_first_and_then_each_second(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    bench.commands.answers["prepare", B] = ShardError("the registry does not answer")
    pauses_s, sleep = list[float](), asyncio.sleep

    async def no_pause(delay_s: float) -> None:
        pauses_s.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(recovery_module, "_RETRY_INTERVAL_S", 0.25)
    monkeypatch.setattr(asyncio, "sleep", no_pause)
    recovering = asyncio.create_task(bench.recovery.recover())
    await until_asked(bench, 6)
    bench.commands.answers.clear()
    await asyncio.wait_for(recovering, 10)
    assert [pause_s for pause_s in pauses_s if pause_s >= 0.25][:5] == [0.25, 0.5, 1.0, 1.0, 1.0]


async def test_a_refusal_that_stays_the_same_is_logged_once(bench: Bench) -> None:
    await bench.start()
    bench.gateway.connected = {A, B}
    bench.commands.answers["prepare", B] = ShardError("registry /srv/shards: no answer")
    with capture_logs() as lines:
        recovering = asyncio.create_task(bench.recovery.recover())
        await until_asked(bench, 4)
        bench.commands.answers.clear()
        await asyncio.wait_for(recovering, 2)
    refused = [line["error"] for line in lines if line["event"].startswith("recovery was refused")]
    assert refused == ["epoch 2 could not be prepared: registry /srv/shards: no answer"]


async def test_a_restarted_controller_deploys_the_last_committed_placement_again(
    bench: Bench, stored_model: StoredModel, tmp_path: Path
) -> None:
    await bench.start()
    bench.log.close()
    restarted = Bench(stored_model, tmp_path)
    await restarted.recovery.resume()
    assert (restarted.live, restarted.deployment.live_number) == (tuple(SPREAD), 2)
    (live,) = restarted.deployment.history
    assert (live.action, live.predicted_latency_s) == ("resume", 1.5)
    assert restarted.planner.asked == []
    await restarted.recovery.resume()
    assert restarted.deployment.live_number == 2, "an epoch that is live is not deployed again"


async def test_a_restarted_controller_plans_without_the_nodes_that_do_not_answer(
    bench: Bench, stored_model: StoredModel, tmp_path: Path
) -> None:
    await bench.start()
    bench.log.close()
    restarted = Bench(stored_model, tmp_path)
    restarted.gateway.connected = {A, B}
    await restarted.recovery.resume()
    assert (restarted.planner.asked, restarted.planner.avoided) == ([(tuple(SPREAD), 0)], [frozenset()])
    assert (restarted.live, restarted.deployment.live_number) == (WITHOUT_C, 2), "the old placement is not tried first"


async def test_a_restarted_controller_plans_again_if_the_last_placement_breaks_a_rule_now(
    bench: Bench, stored_model: StoredModel, tmp_path: Path
) -> None:
    await bench.start()
    bench.log.close()
    restarted = Bench(stored_model, tmp_path)
    restarted.view.adopt(three_node_config(), frozenset({C}), restarted.view.addresses)
    await restarted.recovery.resume()
    assert restarted.planner.asked == [(tuple(SPREAD), 0)]
    assert (restarted.live, restarted.deployment.live_number) == (WITHOUT_C, 2)


async def test_a_resumption_avoids_all_nodes_that_have_refused(
    bench: Bench, stored_model: StoredModel, tmp_path: Path
) -> None:
    await bench.deployment.deploy(Proposal((A, A, C, C, C, C, C, A), "initial", 0))
    bench.log.close()
    restarted = Bench(stored_model, tmp_path)
    restarted.planner.first = [(B,) * 8, (A,) * 8]
    for node in (B, C):
        restarted.commands.answers["prepare", node] = CapacityError("the disk is full")
    await restarted.recovery.resume()
    assert restarted.planner.avoided == [{C}, {B, C}]
    assert restarted.live == (A,) * 8


async def test_without_a_committed_epoch_there_is_nothing_to_resume(bench: Bench) -> None:
    await bench.recovery.resume()
    assert (bench.live, bench.gateway.unavailable, bench.planner.asked) == (None, None, [])


async def test_a_resumption_is_tried_three_times_and_then_requests_get_the_reason(
    bench: Bench, stored_model: StoredModel, tmp_path: Path
) -> None:
    await bench.start()
    bench.log.close()
    restarted = Bench(stored_model, tmp_path)
    restarted.commands.answers["prepare", A] = CapacityError("the disk is full")
    await restarted.recovery.resume()
    assert restarted.live is None
    assert restarted.gateway.unavailable == "alpha cannot prepare a placement; the log of the controller says why"
    assert restarted.log.next_epoch() == 5
