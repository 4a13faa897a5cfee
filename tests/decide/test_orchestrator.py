"""The adaptive orchestrator: keep, redistribute, re-split; what it asks its solver, what a decision says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given
from hypothesis import strategies as st

from resplit.decide import Alternative, Decision, History, Measured, PastMove, Settings, decide
from resplit.decide.decision import NodeConditions
from resplit.decide.orchestrator import _shifts
from resplit.decide.price import is_staged, price, price_current
from resplit.errors import DataError
from resplit.planner import solve
from resplit.planner.evaluate import evaluate
from resplit.types import Plan, Problem
from tests.support.decisions import (
    BEST,
    FAR,
    FAST,
    NO_HISTORY,
    SETTINGS,
    SLOW,
    decide_on,
    halves,
    noisy,
    predicted_s,
    problem,
    random_problem,
)
from tests.support.properties import examples


def test_the_best_placement_is_kept() -> None:
    decision = decide_on(problem(BEST))
    assert decision.action == "keep"
    assert decision.placement == BEST
    assert [option.action for option in decision.alternatives] == ["keep", "redistribute", "re-split"]


def test_a_better_cut_is_a_re_split() -> None:
    decision = decide_on(problem(halves(FAST, SLOW, 2)))
    assert decision.action == "re-split"
    assert decision.placement == BEST
    assert decision.chosen.net_gain > 0
    assert decision.chosen.weight_bytes == 4 * 20e6


def test_better_nodes_under_the_same_cuts_are_a_redistribution() -> None:
    cluster = problem(halves(SLOW, FAR, 6))
    roomy = tuple(replace(node, memory_bytes=8 * 21e6) if node.name == SLOW else node for node in cluster.nodes)
    decision = decide_on(replace(cluster, nodes=roomy))  # with room for old and new blocks at once
    redistribution = decision.alternatives[1]
    assert redistribution.placement == BEST
    assert decision.action == "redistribute"  # as good as the best re-split, and the smaller change


def test_a_move_whose_transfer_takes_the_whole_horizon_is_not_made() -> None:
    slowly = replace(SETTINGS, registry_bytes_per_s=80e6 / 121.0)  # four blocks take more than the horizon
    decision = decide_on(problem(halves(FAST, SLOW, 2)), options=slowly)
    assert decision.action == "keep"
    assert decision.alternatives[2].transfer_s > SETTINGS.horizon_s
    assert decision.alternatives[2].gain_per_request > 0


def test_uncertainty_of_the_cost_model_widens_the_threshold() -> None:
    cluster = problem(halves(FAST, SLOW, 5))
    sure = decide_on(cluster, uncertainty=0.0)
    assert sure.action == "re-split"
    gain = sure.chosen.gain_per_request / sure.alternatives[0].objective
    unsure = decide_on(cluster, uncertainty=gain)
    assert unsure.action == "keep"
    assert "threshold" in unsure.reason


def test_no_optional_move_is_made_within_the_cooldown() -> None:
    cluster = problem(halves(FAST, SLOW, 2))
    history = History(PastMove(990.0, "re-split", BEST, halves(FAST, SLOW, 2), None, 1.0))
    assert decide_on(cluster, 1000.0, history=history).action == "keep"
    assert "10 s ago" in decide_on(cluster, 1000.0, history=history).reason
    assert decide_on(cluster, 990.0 + SETTINGS.cooldown_s, history=history).action == "re-split"


def _lost(cluster: Problem, node: str) -> Problem:
    i = cluster.node_index(node)
    matrices = {}
    for name in ("prefill_s_per_token", "decode_s_per_token", "link_latency_s", "link_bandwidth_bytes_per_s"):
        matrix = getattr(cluster, name).copy()
        matrix[:, i] = np.nan
        if name.startswith("link"):
            matrix[i] = np.nan
        matrices[name] = matrix
    return replace(cluster, **matrices)


URGENT = {
    "a lost node": _lost(problem(BEST), SLOW),
    "a node that left the cluster": problem((*BEST[:-1], "gone")),
    "a broken privacy rule": problem(halves(FAR, FAST)),
    "an overloaded node": problem(halves(SLOW, FAST, 6), rate_rps=2.5, decode_s=(1e-3, 2e-3 * 1.5, 4e-3)),
}


@pytest.mark.parametrize("case", URGENT)
def test_a_broken_placement_is_left_at_once_despite_cooldown_threshold_and_bars(case: str) -> None:
    cluster = URGENT[case]
    assert cluster.current is not None
    history = History(PastMove(999.0, "re-split", BEST, cluster.current, None, 1.0))
    decision = decide_on(cluster, history=history, uncertainty=0.9)
    assert decision.action != "keep"
    assert decision.urgent
    assert decision.urgent in decision.reason
    assert evaluate(cluster, decision.placement).violations == ()
    again = replace(history, barred=()).moved(replace(decision.move(999.5), action="rollback"), SETTINGS)
    assert decide_on(cluster, history=again).placement == decision.placement


def test_leaving_a_broken_placement_is_not_on_trial() -> None:
    decision = decide_on(URGENT["a lost node"], measured=Measured(1.0, 50))
    assert decision.move(1000.0).latency_before_s is None


def test_a_broken_placement_without_an_alternative_is_kept_and_the_reason_says_why() -> None:
    only_far = _lost(_lost(problem(BEST), SLOW), FAST)
    decision = decide_on(only_far)
    assert decision.action == "keep"
    assert "cannot serve" in decision.reason
    assert "there is no alternative" in decision.reason
    decision.to_json()


def test_an_exceeded_limit_justifies_a_move_without_gain_but_not_within_the_cooldown() -> None:
    cluster = problem(BEST)
    short = replace(cluster, nodes=(replace(cluster.nodes[0], memory_bytes=4.5 * 21e6), *cluster.nodes[1:]))
    decision = decide_on(short)
    assert decision.action == "re-split"
    assert decision.chosen.gain_per_request < 0
    assert "memory of fast" in decision.reason
    history = History(PastMove(999.0, "re-split", halves(SLOW, FAST), BEST, None, 1.0))
    assert decide_on(short, history=history).action == "keep"


def _with_slo(cluster: Problem, slo_s: float) -> Problem:
    return replace(cluster, classes=(replace(cluster.classes[0], slo_s=slo_s),))


def test_a_missed_objective_waives_the_cooldown_if_an_alternative_can_meet_it() -> None:
    current = halves(FAST, SLOW, 2)
    history = History(PastMove(999.0, "re-split", BEST, current, None, 1.0))
    slo_s = 1.05 * predicted_s(problem(BEST), BEST)
    assert decide_on(problem(current), history=history).action == "keep"
    decision = decide_on(_with_slo(problem(current), slo_s), history=history)
    assert decision.action == "re-split"
    assert "objective" in decision.urgent
    out_of_reach = _with_slo(problem(BEST), 0.01 * slo_s)
    assert decide_on(out_of_reach, history=history).urgent == ""


def test_a_plan_that_violates_a_constraint_is_rejected_even_if_its_solver_calls_it_optimal() -> None:
    def faulty(cluster: Problem, **_: object) -> Plan:
        return Plan("optimal", "faulty", 0.0, placement=halves(FAR, FAST))

    cluster = problem(halves(SLOW, FAR, 6))
    decision = decide(cluster, now_s=0.0, settings=SETTINGS, history=NO_HISTORY, solve=faulty)
    assert decision.action == "keep"
    assert "trust" in (decision.alternatives[2].reason or "")


def test_a_decision_holds_the_state_that_it_saw() -> None:
    decision = decide_on(URGENT["a lost node"], measured=Measured(1.5, 20, ("chat",)))
    plain = decision.to_json()
    assert plain["action"] == decision.action
    assert plain["chosen"]["placement"] == list(decision.placement)
    assert plain["alternatives"][0]["horizon_cost"] is None
    assert [node["usable"] for node in plain["nodes"]] == [True, False, True]
    assert plain["rates_rps"] == {"chat": 0.5}
    assert plain["measured"]["slo_missed"] == ["chat"]
    assert plain["reason"]


def test_without_a_current_placement_there_is_no_decision() -> None:
    with pytest.raises(DataError, match="no current placement"):
        decide_on(replace(problem(BEST), current=None))


@examples(40, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6))
def test_without_a_gain_the_placement_is_kept_and_no_illegal_one_is_ever_chosen(seed: int) -> None:
    cluster = random_problem(seed)
    decision = decide_on(cluster)
    keep, *others = decision.alternatives
    if decision.action != "keep":
        assert evaluate(cluster, decision.placement).violations == ()
    if not evaluate(cluster, cluster.current or ()).violations and all(option.net_gain <= 0 for option in others):
        assert decision.action == "keep"
    if decision.action != "keep" and not keep.violations:
        assert decision.chosen.net_gain > 0
        assert decision.chosen.gain_per_request > decision.threshold * keep.objective


@examples(8)
@given(seed=st.integers(0, 10**6))
def test_the_same_state_gives_the_same_decision(seed: int) -> None:
    assert decide_on(random_problem(seed)).to_json() == decide_on(random_problem(seed)).to_json()


@examples(12)
@example(seed=869734)
@given(seed=st.integers(0, 10**6))
def test_a_new_placement_is_kept_unless_it_was_a_step_to_a_plan_whose_move_would_pause(seed: int) -> None:
    cluster = random_problem(seed)
    first = decide_on(cluster)
    assume(first.action != "keep")
    second = decide_on(replace(cluster, current=first.placement), now_s=5000.0)
    if second.action != "keep":
        best = solve(cluster).placement
        assert best is not None
        assert is_staged(cluster, best)
        third = decide_on(replace(cluster, current=second.placement), now_s=9000.0)
        assert third.action == "keep"


TICKS = 40


def _moves_of_a_run(options: Settings, uncertainty: float, seed: int) -> list[int]:
    """The ticks at which blocks are moved in a stationary cluster of three nearly equal nodes, measured with noise."""
    rng = np.random.default_rng(seed)
    truth = problem(halves(SLOW, FAST, 5), decode_s=(1e-3, 1.03e-3, 1.06e-3))
    history, moves = History(), []
    for tick in range(TICKS):
        assert truth.current is not None
        latency_s = predicted_s(truth, truth.current) * float(np.exp(0.05 * rng.standard_normal()))
        decision = decide_on(
            noisy(truth, 0.08, rng), 10.0 * tick, options, history, uncertainty, measured=Measured(latency_s, 20)
        )
        if decision.action != "keep":
            moves.append(tick)
            history = history.moved(decision.move(10.0 * tick), options)
            truth = replace(truth, current=decision.placement)
    return moves


@pytest.mark.parametrize("seed", range(3))
def test_a_stationary_state_with_noise_causes_no_lasting_moves(seed: int) -> None:
    moves = _moves_of_a_run(SETTINGS, 0.05, seed)
    assert len(moves) <= 2
    assert all(tick < TICKS // 2 for tick in moves)


def test_without_threshold_and_cooldown_the_same_noise_causes_flapping() -> None:
    eager = replace(SETTINGS, threshold=0.0, uncertainty_weight=0.0, cooldown_s=0.0)
    assert len(_moves_of_a_run(eager, 0.05, 0)) > 5


def _decide_with(
    plans: list[Plan],
    cluster: Problem,
    options: Settings = SETTINGS,
    history: History = NO_HISTORY,
    measured: Measured | None = None,
) -> tuple[Decision, list[tuple[Problem, dict[str, object]]]]:
    """The decision if the solver returns these plans, and the problems and options that it was called with."""
    calls: list[tuple[Problem, dict[str, object]]] = []

    def solver(posed: Problem, **arguments: object) -> Plan:
        calls.append((posed, arguments))
        return plans[len(calls) - 1]

    decision = decide(
        cluster,
        now_s=1000.0,
        settings=options,
        history=history,
        uncertainty=0.03,
        measured=measured,
        solve=solver,
    )
    return decision, calls


NO_PLAN = Plan("infeasible", "test", 0.0)


def test_the_solver_plans_under_the_current_cuts_and_then_under_any_with_the_limits_of_the_settings() -> None:
    options = replace(SETTINGS, solver="other", time_limit_s=2.5, work_limit=77, tolerance=0.04)
    cluster = problem((FAST, FAST, SLOW, SLOW, SLOW, FAST, FAST, FAST))
    _, calls = _decide_with([NO_PLAN, NO_PLAN], cluster, options)
    limits = {"solver": "other", "time_limit_s": 2.5, "work_limit": 77, "tolerance": 0.04}
    assert [arguments for _, arguments in calls] == [limits, limits]
    assert [posed.allowed_cuts for posed, _ in calls] == [frozenset({2, 5}), None]


def test_an_alternative_without_a_plan_says_why_and_keeps_the_bound_of_the_solver() -> None:
    reasoned = Plan("infeasible", "test", 0.0, lower_bound=0.5, reason="no memory")
    decision, _ = _decide_with([reasoned, replace(NO_PLAN, lower_bound=0.25)], problem(BEST))
    assert decision.alternatives[1:] == (
        Alternative("redistribute", None, lower_bound=0.5, reason="no memory"),
        Alternative("re-split", None, lower_bound=0.25, reason="infeasible"),
    )
    assert decision.reason == "no alternative gains more than its move costs"


def test_a_plan_that_violates_constraints_keeps_its_price_and_names_each_of_them() -> None:
    illegal = Plan("optimal", "test", 0.0, placement=(FAR,) * 8, lower_bound=0.5)
    decision, _ = _decide_with([NO_PLAN, illegal], problem(BEST))
    option = decision.alternatives[2]
    assert (option.action, option.placement, option.lower_bound) == ("re-split", None, 0.5)
    assert option.weight_bytes == 8 * 20e6
    assert option.reason == "; ".join(evaluate(problem(BEST), (FAR,) * 8).violations[k].text for k in (0, 1))


def test_a_decision_names_time_threshold_uncertainty_and_demand() -> None:
    better = Plan("optimal", "test", 0.0, placement=BEST, lower_bound=0.5)
    cluster, measured = problem(halves(FAST, SLOW, 2)), Measured(1.5, 20)
    options = replace(SETTINGS, threshold=0.05, uncertainty_weight=2.0)
    decision, _ = _decide_with([NO_PLAN, better], cluster, options, measured=measured)
    assert (decision.at_s, decision.action, decision.urgent) == (1000.0, "re-split", "")
    assert decision.threshold == pytest.approx(0.05 + 2 * 0.03)
    assert (decision.uncertainty, decision.measured, decision.current) == (0.03, measured, cluster.current)
    assert decision.chosen is decision.alternatives[2]
    assert decision.alternatives[2].lower_bound == 0.5
    assert decision.rates_rps == {"chat": 0.5}
    assert decision.nodes == (
        NodeConditions(FAST, True, 6 * 21e6, 0.1, True),
        NodeConditions(SLOW, True, 6 * 21e6, 0.1, True),
        NodeConditions(FAR, True, 6 * 21e6, 0.1, False),
    )


def test_without_a_stated_uncertainty_the_threshold_is_that_of_the_settings() -> None:
    decision = decide(problem(BEST), now_s=0.0, settings=SETTINGS, history=NO_HISTORY, solve=lambda *_, **__: NO_PLAN)
    assert (decision.uncertainty, decision.threshold) == (0.0, SETTINGS.threshold)


def _busy(cluster: Problem, share: float) -> Problem:
    return replace(cluster, nodes=tuple(replace(node, background_utilization=share) for node in cluster.nodes))


def test_where_no_plan_keeps_the_ceilings_a_better_one_above_them_is_chosen_and_the_reason_says_so() -> None:
    cluster = _busy(problem(halves(SLOW, FAST, 6), rate_rps=0.05), 0.96)
    decision = decide_on(cluster)
    assert decision.action == "re-split"
    assert decision.chosen is not None
    assert decision.chosen.latency_s < 0.9 * decision.alternatives[0].latency_s
    assert "no plan keeps max_utilization: fast is planned to be 97." in decision.reason


def test_a_placement_above_the_ceilings_is_kept_if_no_plan_keeps_them_and_none_is_better() -> None:
    decision = decide_on(_busy(problem(BEST, rate_rps=0.05), 0.96))
    assert decision.action == "keep"
    assert decision.urgent == ""
    assert "no plan keeps max_utilization: " in decision.reason


def test_a_plan_within_the_ceilings_is_preferred_to_any_above_them() -> None:
    cluster = problem(halves(FAST, SLOW, 2), rate_rps=0.05)
    busy = tuple(replace(node, background_utilization=0.96) if node.name == FAR else node for node in cluster.nodes)
    decision = decide_on(replace(cluster, nodes=busy))
    assert FAR not in decision.placement
    assert "max_utilization" not in decision.reason


def test_if_a_move_is_staged_its_cuts_are_shifted_until_requests_need_not_wait_for_it() -> None:
    cluster, staged = problem((SLOW,) * 2 + (FAR,) * 6), halves(FAST, SLOW, 3)
    assert is_staged(cluster, staged)
    options = replace(SETTINGS, registry_bytes_per_s=1e7)  # so that the pause is long
    decision, _ = _decide_with([NO_PLAN, Plan("optimal", "test", 0.0, placement=staged)], cluster, options)
    unshifted = price(cluster, "re-split", staged, price_current(cluster, options), options)
    assert not is_staged(cluster, decision.placement)
    assert set(decision.placement) == {FAST, SLOW}
    assert decision.alternatives[2].horizon_cost < unshifted.horizon_cost


def test_shifted_cuts_keep_the_order_of_hosts_and_leave_none_out() -> None:
    placement = (FAST, SLOW, SLOW, SLOW, SLOW, SLOW, SLOW, FAR)
    shifts = list(_shifts(placement))
    assert (FAST, FAST, SLOW, SLOW, SLOW, SLOW, SLOW, FAR) in shifts
    assert (FAST, SLOW, SLOW, SLOW, SLOW, SLOW, FAR, FAR) in shifts
    assert len(set(shifts)) == len(shifts)
    assert all(list(dict.fromkeys(each)) == [FAST, SLOW, FAR] and len(each) == 8 for each in shifts)
    assert list(_shifts((FAST,) * 8)) == []
