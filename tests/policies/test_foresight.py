"""Moves that are known beforehand are decided on the true problem of each phase."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resplit.planner.evaluate import evaluate
from resplit.policies import make_policy
from resplit.policies.foresight import foresee
from tests.support.decisions import FAST, SETTINGS, SLOW, problem
from tests.support.foreseen import CLUSTER, START, moves, slowed


def latency_s(placement: tuple[str, ...]) -> float:
    return evaluate(problem(placement), placement).terms.latency_s


def test_a_move_is_foreseen_where_another_plan_is_best_and_back_where_it_is_not() -> None:
    away, back = moves()
    assert (away.at_s, back.at_s) == (5.0, 20.0)
    assert away.decision.placement.count(FAST) < START.count(FAST)
    assert back.decision.current == away.decision.placement
    assert latency_s(back.decision.placement) <= 1.01 * latency_s(START) < latency_s(away.decision.placement)


def test_a_move_to_a_node_that_was_down_cannot_be_prepared_ahead() -> None:
    lost, back = ({"at": f"{at} s", "node": FAST, "up": up, "label": "x"} for at, up in ((0.1, False), (0.2, True)))
    free = replace(problem(START), blocks=tuple(replace(b, private=False) for b in problem(START).blocks))
    away, again = foresee(free, CLUSTER, slowed(lost, back), make_policy("clairvoyant"), SETTINGS)
    assert (away.can_prepare, again.can_prepare) == (True, False)


@pytest.mark.parametrize("name", ["static", "threshold"])
def test_a_policy_that_keeps_has_no_foreseen_moves(name: str) -> None:
    scenario = slowed({"at": "5 s", "node": SLOW, "slowdown": 1.01, "label": "hardly"})
    assert foresee(problem(START), CLUSTER, scenario, make_policy(name), SETTINGS) == []
