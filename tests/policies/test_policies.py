"""Each policy keeps its promise, and every decision of every policy is priced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from resplit.decide import Decision, History, Measured, PastMove
from resplit.errors import ConfigError
from resplit.planner.evaluate import evaluate
from resplit.policies import ABLATIONS, POLICIES, Policy, Situation, make_policy
from tests.support.decisions import FAR, FAST, SETTINGS, SLOW, halves, problem, random_problem
from tests.support.problems import seeds
from tests.support.properties import examples

BEST = halves(FAST, SLOW, 6)
WORSE = halves(FAST, SLOW, 2)
CALM = Situation(1000.0, problem(WORSE), SETTINGS)


def ask(policy: Policy, situation: Situation) -> Decision:
    return policy.decide(situation, np.random.default_rng(0))


class Reversed:
    """A policy of somebody else: blocks move in reverse order."""

    asked = frozenset({"tick"})

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        return ask(make_policy("static"), situation)


@pytest.mark.parametrize("name", [*POLICIES, *ABLATIONS])
def test_every_policy_can_be_made_and_answers(name: str) -> None:
    decision = ask(make_policy(name), CALM)
    assert decision.chosen in decision.alternatives
    assert decision.alternatives[0].action == "keep"
    assert decision.current == WORSE
    assert Decision.from_json(decision.to_json()) == decision


@given(seeds())
@examples(20)
def test_no_policy_moves_a_legal_placement_to_one_that_breaks_a_rule(seed: int) -> None:
    posed = random_problem(seed)
    assert posed.current is not None
    broken = {each.kind for each in evaluate(posed, posed.current).violations}
    for name in POLICIES:
        decision = ask(make_policy(name), Situation(1000.0, posed, SETTINGS, busy={"node-0": 1.0}))
        kinds = {each.kind for each in evaluate(posed, decision.placement).violations}
        assert kinds - {"utilization"} <= (broken if decision.action == "keep" else set())


def test_a_policy_of_ones_own_is_named_by_its_module() -> None:
    policy = make_policy(f"{__name__}:Reversed")
    assert (type(policy).__name__, policy.asked) == ("Reversed", {"tick"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("statik", "policy: 'statik' is not one of static, threshold"),
        ("no.such.module:Policy", "cannot be made: No module named"),
        ("resplit.policies.static:Nothing", "has no attribute 'Nothing'"),
        ("builtins:object", "has no `asked` or no `decide`"),
    ],
)
def test_a_policy_that_does_not_exist_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(name)


def test_resplit_moves_for_what_is_expected_and_its_ablation_only_for_what_is() -> None:
    now = problem(BEST)
    busy = tuple(replace(node, background_utilization=0.8) if node.name == FAST else node for node in now.nodes)
    expected = Situation(1000.0, now, SETTINGS, ahead=replace(now, nodes=busy))
    assert ask(make_policy("resplit"), replace(expected, ahead=None)).action == "keep"
    assert ask(make_policy("resplit"), expected).action != "keep"
    assert ask(make_policy("resplit-without-forecast"), expected).action == "keep"


def test_static_is_never_asked_and_keeps() -> None:
    policy = make_policy("static")
    assert policy.asked == frozenset()
    assert ask(policy, CALM).placement == WORSE


def test_clairvoyant_takes_the_best_plan_of_the_phase_whatever_the_move_costs() -> None:
    dear = replace(SETTINGS, horizon_s=0.001, registry_bytes_per_s=1.0)
    decision = ask(make_policy("clairvoyant"), replace(CALM, settings=dear))
    assert (decision.action, decision.placement) == ("re-split", BEST)
    assert ask(make_policy("resplit"), replace(CALM, settings=dear)).action == "keep"
    assert ask(make_policy("clairvoyant"), Situation(0.0, problem(BEST), SETTINGS)).action == "keep"


def test_the_threshold_policy_moves_at_the_third_of_five_ticks_with_a_hot_node() -> None:
    policy, hot = make_policy("threshold"), replace(CALM, busy={FAST: 0.9})
    actions = [ask(policy, each).action for each in (hot, CALM, hot, CALM, CALM, hot, hot)]
    assert actions == ["keep"] * 6 + ["re-split"]


def test_the_threshold_policy_moves_when_requests_miss_their_objective_and_waits_for_its_cooldown() -> None:
    missing = replace(CALM, measured=Measured(3.0, 10, ("chat",)))
    last = PastMove(CALM.now_s - 1, "re-split", BEST, WORSE, None, 1.0)
    policy = make_policy("threshold")
    assert [ask(policy, missing).action for _ in range(3)] == ["keep", "keep", "re-split"]
    cooling = replace(missing, history=History(last))
    decisions = [ask(policy, cooling) for _ in range(3)]
    assert decisions[-1].reason == "chat misses its service objective, but the last move was 1 s ago"


def test_the_threshold_policy_sees_only_nodes_that_hold_blocks() -> None:
    policy = make_policy("threshold")
    reasons = [ask(policy, replace(CALM, busy={FAR: 1.0})).reason for _ in range(3)]
    assert reasons[-1] == "exceeded in 0 of the last 3 ticks: no bound"


def test_resplit_plans_at_a_tick_only_if_there_is_news() -> None:
    policy, calm = make_policy("resplit"), replace(CALM, problem=problem(BEST))
    first, again = ask(policy, calm), ask(policy, replace(calm, now_s=calm.now_s + 2))
    assert len(first.alternatives) > 1
    assert (len(again.alternatives), again.action) == (1, "keep")
    surge = replace(calm, now_s=calm.now_s + 4, problem=problem(BEST, rate_rps=5.0))
    assert len(ask(policy, surge).alternatives) > 1


@pytest.mark.parametrize("forecast", [False, True])
def test_without_queueing_the_load_does_not_matter(forecast: bool) -> None:
    posed = [problem(WORSE, rate_rps=rate) for rate in (0.5, 20.0)]
    calm, busy = (replace(CALM, problem=each, ahead=each if forecast else None) for each in posed)
    assert ask(make_policy("resplit"), busy).chosen.latency_s > 1.1 * ask(make_policy("resplit"), calm).chosen.latency_s
    without = [ask(make_policy("resplit-without-queueing"), each).chosen for each in (calm, busy)]
    assert without[0].latency_s == pytest.approx(without[1].latency_s, rel=1e-3)


def test_without_hysteresis_a_move_follows_a_move_at_once() -> None:
    moved = History(PastMove(CALM.now_s - 1, "re-split", BEST, WORSE, None, 1.0))
    situation = replace(CALM, history=moved)
    assert ask(make_policy("resplit"), situation).action == "keep"
    assert ask(make_policy("resplit-without-hysteresis"), situation).action != "keep"
