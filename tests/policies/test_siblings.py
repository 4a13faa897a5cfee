"""The rules of others: each policy does what its paper or its code says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.decide import Decision, History, Measured
from resplit.planner import solve
from resplit.policies import Policy, Situation, make_policy
from tests.support.decisions import FAST, SETTINGS, SLOW, halves, moved, problem

PLACED = halves(FAST, SLOW, 4)
TICK = Situation(1000.0, problem(PLACED), SETTINGS, measured=Measured(1.0, 20), busy={FAST: 0.2, SLOW: 0.8})


def ask(policy: Policy, situation: Situation) -> Decision:
    return policy.decide(situation, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("policy", "solver"),
    [("memory", "memory"), ("latency-dp", "latency-dp"), ("swarm", "swarm"), ("greedy", "greedy")],
)
def test_a_planned_policy_takes_the_plan_of_its_planner_and_then_waits_for_its_cooldown(
    policy: str, solver: str
) -> None:
    decision = ask(make_policy(policy), TICK)
    assert decision.placement == (solve(TICK.problem, solver=solver, work_limit=1000).placement or PLACED)
    just_moved = replace(TICK, history=History(replace(moved(), at_s=TICK.now_s - 1)))
    assert ask(make_policy(policy), just_moved).action == "keep"


@pytest.mark.parametrize("policy", ["static-uniform", "memory"])
def test_a_rule_that_does_not_know_trust_is_applied_to_the_trusted_nodes_where_it_would_break_it(policy: str) -> None:
    private_end = replace(TICK.problem.blocks[-1], private=True)  # both put it on `far`, which is not trusted
    posed = replace(problem(halves(FAST, SLOW, 2)), blocks=(*TICK.problem.blocks[:-1], private_end))
    assert solve(posed, solver="uniform").placement is None
    assert ask(make_policy(policy), replace(TICK, problem=posed)).placement == PLACED


def test_equal_parts_are_placed_once() -> None:
    policy = make_policy("static-uniform")
    assert ask(policy, TICK).action in ("keep", "redistribute", "re-split")
    later = replace(TICK, now_s=9000.0, history=History(moved()))
    assert ask(policy, later).action == "keep"


def test_the_balancer_takes_half_a_step_after_a_window_of_ticks_and_goes_back_if_requests_take_longer() -> None:
    policy = make_policy("balance")
    decisions = [ask(policy, replace(TICK, now_s=1000.0 + 2 * tick)) for tick in range(5)]
    assert [each.action for each in decisions[:-1]] == ["keep"] * 4
    step = decisions[-1].placement
    assert PLACED.count(SLOW) > step.count(SLOW) > 0
    later = replace(TICK, now_s=9000.0, problem=replace(TICK.problem, current=step), measured=Measured(1.5, 20))
    assert ask(policy, later).placement == PLACED
