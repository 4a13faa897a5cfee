"""Moves that were decided beforehand are proposed ahead of time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from resplit.decide import Decision
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from resplit.policies import make_policy
from resplit.policies.foresight import foresee
from tasks.foresee import move_on_schedule
from tests.support.decisions import FAST, SETTINGS, problem
from tests.support.foreseen import CLUSTER, START, moves, slowed


@dataclass
class Controller:
    """Stands in for the control API: it refuses the first proposals, and remembers the others and the decisions."""

    refusals: int = 0
    epoch: int = 4
    placement: tuple[str, ...] = START
    proposals: list[Proposal] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def model(self) -> Any:
        return SimpleNamespace(epoch=self.epoch, placement=self.placement)

    def propose(self, proposal: Proposal) -> Any:
        if self.refusals:
            self.refusals -= 1
            self.epoch += 1
            raise ProposalRefusedError("a loss came between")
        self.proposals.append(proposal)
        self.epoch, self.placement = self.epoch + 1, proposal.placement
        return self.model()

    def log_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)


def test_each_move_is_proposed_for_its_time_against_the_epoch_before_it() -> None:
    controller, now_s = Controller(), time.time()
    move_on_schedule.fn(controller, moves(), now_s, now_s + 60)  # type: ignore[arg-type]
    assert [(p.based_on, p.not_before_s) for p in controller.proposals] == [(4, now_s + 5), (5, now_s + 20)]
    assert [d.outcome and d.outcome.deployed for d in controller.decisions] == [5, 6]
    assert [d.at_s for d in controller.decisions] == [now_s + 5, now_s + 20]


def test_a_refused_move_is_proposed_again_and_one_that_is_live_already_is_not() -> None:
    first, second = moves()
    controller, now_s = Controller(refusals=2), time.time()
    move_on_schedule.fn(controller, [first, first, second], now_s, now_s + 60)  # type: ignore[arg-type]
    assert [p.based_on for p in controller.proposals] == [6, 7]
    outcome = controller.decisions[1].outcome
    assert outcome is not None
    assert outcome.refused == "it is live already"


def test_a_move_whose_phase_has_ended_is_not_made() -> None:
    controller, past_s = Controller(), time.time() - 100
    move_on_schedule.fn(controller, [replace(moves()[0], at_s=1.0)], past_s, past_s + 60)  # type: ignore[arg-type]
    assert controller.proposals == []
    outcome = controller.decisions[0].outcome
    assert outcome.refused == "its phase had ended"


def test_a_move_to_a_node_that_was_down_is_not_proposed_before_the_node_is_back() -> None:
    lost, back = ({"at": f"{at} s", "node": FAST, "up": up, "label": "x"} for at, up in ((0.1, False), (0.2, True)))
    free = replace(problem(START), blocks=tuple(replace(b, private=False) for b in problem(START).blocks))
    _, again = foresee(free, CLUSTER, slowed(lost, back), make_policy("clairvoyant"), SETTINGS)
    controller, now_s = Controller(), time.time()
    move_on_schedule.fn(controller, [again], now_s, now_s + 60)  # type: ignore[arg-type]
    assert time.time() >= now_s + 0.2
