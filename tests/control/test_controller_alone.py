"""The controller without nodes: which part of it is told of which event, and which files it keeps."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resplit.control.controller import Controller
from resplit.control.log import EpochLog
from resplit.control.outcomes import Outcomes
from resplit.decide import Decision, DecisionOutcome, History, PastMove, Settings
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import CapacityError
from resplit.model.source import StoredModel
from resplit.pass_times import PassTime
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER, Member
from resplit.session_records import RecoveredSessions
from resplit.shards.keyring import Keyring
from resplit.types import RequestClass
from resplit.wire.addresses import Address
from resplit.wire.routes import Route
from tests.support.latest_problem import problem_of
from tests.support.recording_control import RecordingGateway
from tests.support.three_nodes import SPREAD, A, B, C, three_node_config

SESSIONS = RecoveredSessions(3, 0.1, 0.2, 0.3, 0.4, 5, 6, 7)


class Gateway(RecordingGateway):
    def suspects(self) -> frozenset[str]:
        return frozenset()

    def demand(self, window_s: float) -> list[RequestClass]:
        return []

    def recoveries(self, epoch: int | None) -> RecoveredSessions | None:
        return SESSIONS if epoch == 7 else None


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Member:
    folder = tmp_path_factory.mktemp("keys")
    keys_command(folder, (A, B, C))
    return Member.load(folder / CONTROLLER)


class Bench:
    """A controller of nodes that do not exist; `events` has which of its parts did what."""

    def __init__(self, model: StoredModel, member: Member, folder: Path) -> None:
        config = three_node_config()
        self.events: list[str] = []
        self.log = EpochLog(folder / "epochs.db")
        gateway: Any = Gateway({A, B, C}, [])
        addresses = {name: Address("127.0.0.1", 1) for name in config.node_names}
        self.controller = Controller(
            config, model, member, Keyring(folder / "keyring.json"), self.log, {}, addresses, gateway, folder
        )

    def noting(self, event: str) -> Callable[..., Coroutine[Any, Any, None]]:
        """Work that notes an event, and what it is given."""

        async def note(*given: object) -> None:
            self.events.append(" ".join([event, *map(str, given)]))

        return note

    def serve(self) -> None:
        """Have an epoch be live."""
        self.controller.deployment.live = Route(1, (A, A, A, A, A, A, A, B), {})

    async def settle(self) -> list[str]:
        """The events so far, once what they began has ended."""
        await asyncio.sleep(0.01)
        return self.events


@pytest.fixture
async def bench(stored_model: StoredModel, member: Member, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(stored_model, member, tmp_path)
    yield bench
    await bench.controller.stop()


async def test_only_the_loss_of_a_node_of_the_live_epoch_begins_a_recovery(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.controller.recovery, "restore", bench.noting("restore"))
    bench.controller.node_lost(A)
    assert await bench.settle() == []
    bench.serve()
    bench.controller.node_lost(C)
    assert await bench.settle() == []
    bench.controller.node_lost(B)
    assert await bench.settle() == ["restore"]


async def test_an_outage_begins_a_recovery_whose_refusal_ends_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        bench.events.append("restore")
        raise CapacityError("the disk is full")

    monkeypatch.setattr(bench.controller.recovery, "restore", refuse)
    bench.controller.deployment.on_outage()
    assert await bench.settle() == ["restore"]
    await bench.controller.recover()
    assert bench.events == ["restore", "restore"]


async def test_a_node_that_answers_is_welcomed_once_nodes_were_introduced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = bench.controller
    monkeypatch.setattr(controller.recovery, "node_returned", lambda: bench.events.append("returned"))
    monkeypatch.setattr(controller.readiness, "forget", lambda name: bench.events.append(f"forget {name}"))
    monkeypatch.setattr(controller.membership, "welcome", bench.noting("welcome"))
    controller.node_found(A)
    assert await bench.settle() == ["returned", "forget alpha"]
    controller.membership.introduced = True
    bench.events.clear()
    controller.node_found("stranger")
    assert await bench.settle() == ["returned", "forget stranger"]
    bench.events.clear()
    controller.node_found(A)
    assert await bench.settle() == ["returned", "forget alpha", "welcome alpha"]


async def test_a_controller_starts_with_what_was_live_and_then_runs_its_loops(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = bench.controller
    for part, method in [
        (controller.membership, "introduce"),
        (controller.recovery, "resume"),
        (controller.fast_loop, "run"),
        (controller.readiness, "run"),
    ]:
        monkeypatch.setattr(part, method, bench.noting(f"{type(part).__name__} {method}"))
    await controller.start()
    assert await bench.settle() == ["Membership introduce", "Recovery resume", "FastLoop run", "Readiness run"]


async def test_each_epoch_that_goes_live_is_judged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def judge(outcomes: Outcomes, epoch: LiveEpoch) -> None:
        bench.events.append(f"judge {epoch.epoch}")

    monkeypatch.setattr(Outcomes, "judge", judge)
    bench.controller.deployment.on_live(LiveEpoch(3, 0.0, "initial", (A,), None, None, 0.0, 0.0))
    assert await bench.settle() == ["judge 3"]


async def test_a_pass_counts_and_is_shown_to_the_fast_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[PassTime] = []
    monkeypatch.setattr(bench.controller.fast_loop, "passed", shown.append)
    done = PassTime(1, 20, 1, 5.0, 0.25, ())
    bench.controller.passed(done)
    assert shown == [done]
    assert (bench.controller.spent.passes, bench.controller.spent.hops_s) == (1, 0.25)


async def test_what_flows_propose_gives_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Proposal, bool]] = []

    async def deploy(proposal: Proposal, gives_way: bool = False) -> None:
        asked.append((proposal, gives_way))

    monkeypatch.setattr(bench.controller.deployment, "deploy", deploy)
    proposal = Proposal(tuple(SPREAD), "re-split", 0)
    await bench.controller.deploy(proposal)
    assert asked == [(proposal, True)]


async def test_the_outcome_of_a_recovery_says_how_sessions_resumed(bench: Bench) -> None:
    logged = [
        Decision(1.0, RECOVER, outcome=DecisionOutcome(7, plan_s=0.5)),
        Decision(2.0, RECOVER),
        Decision(3.0, "re-split", outcome=DecisionOutcome(7)),
        Decision(4.0, RECOVER, outcome=DecisionOutcome(8)),
    ]
    for decision in logged:
        bench.log.append_decision(decision)
    numbered = [replace(decision, id=number) for number, decision in enumerate(logged, start=1)]
    with_sessions = replace(numbered[0], outcome=DecisionOutcome(7, plan_s=0.5, sessions=SESSIONS))
    assert bench.controller.decisions(0) == [with_sessions, *numbered[1:]]
    assert bench.controller.decisions(2) == numbered[2:]


async def test_problem_and_moves_are_kept_in_files_that_the_next_controller_reads(
    bench: Bench, stored_model: StoredModel, member: Member, tmp_path: Path
) -> None:
    move = PastMove(1.0, "re-split", (A,), (B,), None, 2.0)
    bench.controller.moves.moved(move, Settings())
    view = bench.controller.view
    bench.controller.planner.set_problem(problem_of(view.cluster, view.rules.features, SPREAD))
    assert {"latest_problem.json", "history.json"} <= set(os.listdir(tmp_path))
    after = Bench(stored_model, member, tmp_path).controller
    assert after.moves.history == bench.controller.moves.history != History()
    assert after.planner.present_problem(tuple(SPREAD), 30.0).current == tuple(SPREAD)


async def test_the_parts_use_one_another(bench: Bench) -> None:
    controller = bench.controller
    assert controller.planner.after_loss == controller.readiness.after_loss
    assert controller.readiness.pose == controller.fast_loop._present_problem
    assert controller.emulation_warning() == ""
    assert controller.live is None
