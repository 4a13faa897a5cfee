"""The adaptive orchestrator: keep, redistribute, re-split, roll back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from resplit.decide import Alternative, Decision, History, Measured, PastMove, Settings, decide
from resplit.decide.decision import NodeSeen
from resplit.decide.orchestrator import _choose_by_net_gain, _choose_escape, _Hysteresis, _missed_objective
from resplit.decide.price import CurrentPlacement
from resplit.errors import DataError
from resplit.planner.evaluate import evaluate
from resplit.types import Plan, Problem
from tests.support.decisions import FAR, FAST, SETTINGS, SLOW, halves, noisy, problem, random_problem
from tests.support.properties import examples

NO_HISTORY = History()
BEST = halves(FAST, SLOW, 6)  # the fast node holds as many blocks as it can


def _decide(
    cluster: Problem,
    now_s: float = 1000.0,
    options: Settings = SETTINGS,
    history: History = NO_HISTORY,
    uncertainty: float = 0.02,
    measured: Measured | None = None,
) -> Decision:
    return decide(cluster, now_s=now_s, settings=options, history=history, uncertainty=uncertainty, measured=measured)


def _latency_s(cluster: Problem, placement: tuple[str, ...]) -> float:
    return evaluate(cluster, placement).terms.latency_s


def _moved(action: str = "re-split", before: tuple[str, ...] = BEST, before_s: float | None = 1.0) -> PastMove:
    return PastMove(990.0, action, before, halves(FAST, SLOW, 4), before_s, _latency_s(problem(before), before))


def test_the_best_placement_is_kept() -> None:
    decision = _decide(problem(BEST))
    assert decision.action == "keep"
    assert decision.placement == BEST
    assert [option.action for option in decision.alternatives] == ["keep", "redistribute", "re-split"]


def test_a_better_cut_is_a_re_split() -> None:
    decision = _decide(problem(halves(FAST, SLOW, 2)))
    assert decision.action == "re-split"
    assert decision.placement == BEST
    assert decision.chosen.net_gain > 0
    assert decision.chosen.weight_bytes == 4 * 20e6


def test_better_nodes_under_the_same_cuts_are_a_redistribution() -> None:
    cluster = problem(halves(SLOW, FAR, 6))
    roomy = tuple(replace(node, memory_bytes=8 * 21e6) if node.name == SLOW else node for node in cluster.nodes)
    decision = _decide(replace(cluster, nodes=roomy))  # with room for old and new blocks at once
    redistribution = decision.alternatives[1]
    assert redistribution.placement == BEST
    assert decision.action == "redistribute"  # as good as the best re-split, and the smaller change


def test_a_move_whose_transfer_takes_the_whole_horizon_is_not_made() -> None:
    slowly = replace(SETTINGS, registry_bytes_per_s=80e6 / 121.0)  # four blocks take more than the horizon
    decision = _decide(problem(halves(FAST, SLOW, 2)), options=slowly)
    assert decision.action == "keep"
    assert decision.alternatives[2].transfer_s > SETTINGS.horizon_s
    assert decision.alternatives[2].gain_per_request > 0


def test_uncertainty_of_the_cost_model_widens_the_threshold() -> None:
    cluster = problem(halves(FAST, SLOW, 5))
    sure = _decide(cluster, uncertainty=0.0)
    assert sure.action == "re-split"
    gain = sure.chosen.gain_per_request / sure.alternatives[0].objective
    unsure = _decide(cluster, uncertainty=gain)
    assert unsure.action == "keep"
    assert "threshold" in unsure.reason


def test_no_optional_move_is_made_within_the_cooldown() -> None:
    cluster = problem(halves(FAST, SLOW, 2))
    history = History(PastMove(990.0, "re-split", BEST, halves(FAST, SLOW, 2), None, 1.0))
    assert _decide(cluster, 1000.0, history=history).action == "keep"
    assert "10 s ago" in _decide(cluster, 1000.0, history=history).reason
    assert _decide(cluster, 990.0 + SETTINGS.cooldown_s, history=history).action == "re-split"


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
    decision = _decide(cluster, history=history, uncertainty=0.9)
    assert decision.action != "keep"
    assert decision.urgent
    assert decision.urgent in decision.reason
    assert evaluate(cluster, decision.placement).violations == ()
    again = replace(history, barred=()).moved(replace(decision.move(999.5), action="rollback"), SETTINGS)
    assert _decide(cluster, history=again).placement == decision.placement


def test_leaving_a_broken_placement_is_not_on_trial() -> None:
    decision = _decide(URGENT["a lost node"], measured=Measured(1.0, 50))
    assert decision.move(1000.0).latency_before_s is None


def test_a_broken_placement_without_an_alternative_is_kept_and_the_reason_says_why() -> None:
    only_far = _lost(_lost(problem(BEST), SLOW), FAST)
    decision = _decide(only_far)
    assert decision.action == "keep"
    assert "cannot serve" in decision.reason
    assert "there is no alternative" in decision.reason
    decision.to_json()


def test_an_exceeded_limit_justifies_a_move_without_gain_but_not_within_the_cooldown() -> None:
    cluster = problem(BEST)
    short = replace(cluster, nodes=(replace(cluster.nodes[0], memory_bytes=4.5 * 21e6), *cluster.nodes[1:]))
    decision = _decide(short)
    assert decision.action == "re-split"
    assert decision.chosen.gain_per_request < 0
    assert "memory of fast" in decision.reason
    history = History(PastMove(999.0, "re-split", halves(SLOW, FAST), BEST, None, 1.0))
    assert _decide(short, history=history).action == "keep"


def _with_slo(cluster: Problem, slo_s: float) -> Problem:
    return replace(cluster, classes=(replace(cluster.classes[0], slo_s=slo_s),))


def test_a_missed_objective_waives_the_cooldown_if_an_alternative_can_meet_it() -> None:
    current = halves(FAST, SLOW, 2)
    history = History(PastMove(999.0, "re-split", BEST, current, None, 1.0))
    slo_s = 1.05 * _latency_s(problem(BEST), BEST)
    assert _decide(problem(current), history=history).action == "keep"
    decision = _decide(_with_slo(problem(current), slo_s), history=history)
    assert decision.action == "re-split"
    assert "objective" in decision.urgent
    out_of_reach = _with_slo(problem(BEST), 0.01 * slo_s)
    assert _decide(out_of_reach, history=history).urgent == ""


def test_a_move_that_made_latency_worse_is_rolled_back_and_barred() -> None:
    worse = problem(halves(FAST, SLOW, 4))
    history = History(_moved())
    decision = _decide(worse, history=history, measured=Measured(1.5, 20))
    assert decision.action == "rollback"
    assert decision.placement == BEST
    after = history.moved(decision.move(1000.0), SETTINGS)
    assert after.bars(halves(FAST, SLOW, 4), 1000.0 + SETTINGS.bar_s - 1)
    assert not after.bars(halves(FAST, SLOW, 4), 1000.0 + SETTINGS.bar_s)
    assert not after.bars(BEST, 1001.0)


def test_a_barred_placement_is_not_chosen_even_if_its_gain_is_large() -> None:
    current = halves(FAST, SLOW, 2)
    history = History().moved(PastMove(500.0, "rollback", BEST, current, None, 1.0), SETTINGS)
    decision = _decide(problem(current), history=history)
    assert decision.placement != BEST
    free = _decide(problem(current), now_s=500.0 + SETTINGS.bar_s, history=history)
    assert free.placement == BEST


@pytest.mark.parametrize(
    ("history", "measured", "now_s"),
    [
        (History(_moved()), Measured(1.1, 20), 1000.0),
        (History(_moved()), Measured(1.5, SETTINGS.trial_requests - 1), 1000.0),
        (History(_moved()), Measured(1.5, 20, error_s=0.2), 1000.0),
        (History(replace(_moved(), error_before_s=0.2)), Measured(1.5, 20), 1000.0),
        (History(_moved()), None, 1000.0),
        (History(_moved(before_s=None)), Measured(1.5, 20), 1000.0),
        (History(_moved()), Measured(1.5, 20), 991.0 + SETTINGS.trial_s),
        (History(_moved(action="rollback")), Measured(1.5, 20), 1000.0),
        (History(_moved(before=halves(FAR, FAST))), Measured(1.5, 20), 1000.0),
        (History(_moved(before=halves(FAST, SLOW, 5))), Measured(1.5, 20), 1000.0),
    ],
    ids=[
        "within margin",
        "few requests",
        "by chance",
        "by chance before",
        "unmeasured",
        "unmeasured before",
        "trial over",
        "a rollback",
        "illegal",
        "failed trial",
    ],
)
def test_only_a_failed_trial_causes_a_rollback(
    history: History, measured: Measured | None, now_s: float, request: pytest.FixtureRequest
) -> None:
    action = _decide(problem(halves(FAST, SLOW, 4)), now_s, history=history, measured=measured).action
    assert (action == "rollback") == ("failed trial" in request.node.name)


def test_a_placement_that_does_not_come_from_the_last_move_is_not_rolled_back() -> None:
    elsewhere = replace(_moved(), after=halves(FAST, SLOW, 3))  # the controller moved it since
    decision = _decide(problem(halves(FAST, SLOW, 4)), history=History(elsewhere), measured=Measured(1.5, 20))
    assert decision.action != "rollback"


def test_a_plan_that_violates_a_constraint_is_rejected_even_if_its_solver_calls_it_optimal() -> None:
    def faulty(cluster: Problem, **_: object) -> Plan:
        return Plan("optimal", "faulty", 0.0, placement=halves(FAR, FAST))

    cluster = problem(halves(SLOW, FAR, 6))
    decision = decide(cluster, now_s=0.0, settings=SETTINGS, history=NO_HISTORY, solve=faulty)
    assert decision.action == "keep"
    assert "trust" in (decision.alternatives[2].reason or "")


def test_a_surge_that_would_have_slowed_the_old_placement_as_much_causes_no_rollback() -> None:
    surged = problem(halves(FAST, SLOW, 4), rate_rps=1.9)
    ratio = _latency_s(replace(surged, current=BEST), BEST) / _latency_s(problem(BEST), BEST)
    assert ratio > 1.3
    decision = _decide(surged, history=History(_moved()), measured=Measured(1.05 * ratio, 20))
    assert decision.action != "rollback"


def test_a_decision_holds_the_state_that_it_saw() -> None:
    decision = _decide(URGENT["a lost node"], measured=Measured(1.5, 20, ("chat",)))
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
        _decide(replace(problem(BEST), current=None))


@examples(40, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6))
def test_without_a_gain_the_placement_is_kept_and_no_illegal_one_is_ever_chosen(seed: int) -> None:
    cluster = random_problem(seed)
    decision = _decide(cluster)
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
    assert _decide(random_problem(seed)).to_json() == _decide(random_problem(seed)).to_json()


@examples(12)
@given(seed=st.integers(0, 10**6))
def test_a_new_placement_is_kept_in_the_next_tick(seed: int) -> None:
    cluster = random_problem(seed)
    first = _decide(cluster)
    assume(first.action != "keep")
    second = _decide(replace(cluster, current=first.placement), now_s=5000.0)
    assert second.action == "keep"


TICKS = 40


def _moves_of_a_run(options: Settings, uncertainty: float, seed: int) -> list[int]:
    """The ticks at which blocks are moved in a stationary cluster of three nearly equal nodes, measured with noise."""
    rng = np.random.default_rng(seed)
    truth = problem(halves(SLOW, FAST, 5), decode_s=(1e-3, 1.03e-3, 1.06e-3))
    history, moves = History(), []
    for tick in range(TICKS):
        assert truth.current is not None
        latency_s = _latency_s(truth, truth.current) * float(np.exp(0.05 * rng.standard_normal()))
        decision = _decide(
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


KEEP = Alternative("keep", BEST, objective=10.0, latency_s=10.0, shortfall_s=2.0)
CURRENT = CurrentPlacement(KEEP, broken="", exceeded="", cached_tokens=0.0)
OTHER = Alternative("re-split", halves(FAST, SLOW, 2), gain_per_request=1.0, net_gain=5.0, shortfall_s=1.0)


def _hysteresis(history: History = NO_HISTORY, now_s: float = 1000.0, threshold: float = 0.05) -> _Hysteresis:
    return _Hysteresis(SETTINGS, history, now_s, threshold)


@pytest.mark.parametrize(("gain", "objects"), [(0.5, True), (0.51, False)])
def test_the_gain_per_request_must_exceed_the_threshold(gain: float, objects: bool) -> None:
    option = replace(OTHER, gain_per_request=gain)
    assert ("threshold" in _hysteresis().objection(option, CURRENT, waive_cooldown=False)) == objects
    exceeded = replace(CURRENT, exceeded="memory of fast")
    assert _hysteresis().objection(option, exceeded, waive_cooldown=False) == ""


@pytest.mark.parametrize(
    ("since_s", "waived", "objects"),
    [(0.0, False, True), (29.9, False, True), (30.0, False, False), (0.0, True, False)],
)
def test_the_cooldown_counts_from_the_last_move_unless_it_is_waived(
    since_s: float, waived: bool, objects: bool
) -> None:
    hysteresis = _hysteresis(History(replace(_moved(), at_s=1000.0 - since_s)))
    assert ("last move" in hysteresis.objection(OTHER, CURRENT, waive_cooldown=waived)) == objects


def test_waiving_the_cooldown_waives_neither_the_threshold_nor_a_bar() -> None:
    assert OTHER.placement is not None
    barred = History().moved(PastMove(900.0, "rollback", OTHER.placement, BEST, None, 1.0), SETTINGS)
    assert "rolled back" in _hysteresis(barred).objection(OTHER, CURRENT, waive_cooldown=True)
    assert "threshold" in _hysteresis(threshold=0.2).objection(OTHER, CURRENT, waive_cooldown=True)


MISSED = Measured(10.0, 20, ("chat",))
MET = Measured(10.0, 20)


@pytest.mark.parametrize(
    ("shortfall_s", "other_s", "measured", "urgent"),
    [
        (2.0, 1.0, None, "a service objective is missed"),
        (2.0, 1.0, MET, "a service objective is missed"),
        (2.0, 1.0, MISSED, "a service objective is missed (chat)"),
        (2.0, 2.0, MISSED, ""),
        (2.0, 3.0, MISSED, ""),
        (0.5, 0.0, None, ""),
        (0.5, 0.0, MET, ""),
        (0.51, 0.0, MET, "a service objective is missed"),
        (0.5, 0.0, MISSED, "a service objective is missed (chat)"),
        (0.0, 0.0, MISSED, ""),
    ],
)
def test_the_cooldown_is_waived_if_an_objective_is_missed_and_a_plan_misses_it_by_less(
    shortfall_s: float, other_s: float, measured: Measured | None, urgent: str
) -> None:
    current = replace(CURRENT, keep=replace(KEEP, shortfall_s=shortfall_s))
    plans = [Alternative("redistribute", None), replace(OTHER, shortfall_s=other_s)]
    assert _missed_objective(current, plans, measured, threshold=0.05) == urgent


def test_a_plan_without_a_placement_does_not_waive_the_cooldown() -> None:
    assert _missed_objective(CURRENT, [replace(OTHER, placement=None, shortfall_s=0.0)], MISSED, 0.05) == ""


def test_one_plan_of_two_that_misses_an_objective_by_less_waives_the_cooldown() -> None:
    plans = [replace(OTHER, shortfall_s=9.0), OTHER]
    assert _missed_objective(CURRENT, plans, MISSED, 0.05)


def test_the_highest_net_gain_is_chosen_and_a_tie_is_a_redistribution() -> None:
    redistribute = replace(OTHER, action="redistribute")
    assert _choose_by_net_gain(CURRENT, [redistribute, OTHER], None, _hysteresis()).chosen is redistribute
    better = replace(OTHER, net_gain=5.1)
    assert _choose_by_net_gain(CURRENT, [redistribute, better], None, _hysteresis()).chosen is better


def test_if_hysteresis_objects_to_the_best_plan_the_next_best_is_chosen() -> None:
    assert OTHER.placement is not None
    barred = History().moved(PastMove(900.0, "rollback", OTHER.placement, BEST, None, 1.0), SETTINGS)
    second = replace(OTHER, action="redistribute", placement=halves(SLOW, FAST, 4), net_gain=1.0)
    assert _choose_by_net_gain(CURRENT, [second, OTHER], None, _hysteresis(barred)).chosen is second


def test_if_hysteresis_objects_to_all_plans_the_reason_describes_the_best_plan() -> None:
    plans = [replace(OTHER, net_gain=1.0, latency_s=1.0), replace(OTHER, latency_s=2.0)]
    choice = _choose_by_net_gain(CURRENT, plans, None, _hysteresis(threshold=0.2))
    assert choice.chosen is KEEP
    assert choice.reason.startswith("re-split promises 2.000 s")
    assert "within the threshold of 20.0%" in choice.reason


@pytest.mark.parametrize(("net_gain", "action"), [(0.0, "keep"), (0.1, "re-split")])
def test_a_move_must_gain_more_than_it_costs(net_gain: float, action: str) -> None:
    choice = _choose_by_net_gain(CURRENT, [replace(OTHER, net_gain=net_gain)], None, _hysteresis())
    assert choice.chosen.action == action


def test_a_broken_placement_is_left_for_the_least_cost_over_the_horizon() -> None:
    broken = replace(CURRENT, broken="lost")
    cheaper, costlier = replace(OTHER, horizon_cost=3.0), replace(OTHER, action="redistribute", horizon_cost=4.0)
    impossible = replace(OTHER, placement=None, horizon_cost=1.0)
    choice = _choose_escape(broken, [costlier, impossible, cheaper])
    assert (choice.chosen, choice.urgent) == (cheaper, "lost")


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
        NodeSeen(FAST, True, 6 * 21e6, 0.1, True),
        NodeSeen(SLOW, True, 6 * 21e6, 0.1, True),
        NodeSeen(FAR, True, 6 * 21e6, 0.1, False),
    )


def test_the_reason_of_a_move_gives_its_latency_gain_bytes_and_time() -> None:
    option = replace(OTHER, latency_s=1.25, gain_per_request=0.5, weight_bytes=80e6, cache_bytes=2.5e6, transfer_s=1.75)
    costs = "for 80 MB of weights and 2.5 MB of caches in 1.8 s"
    decided = _choose_by_net_gain(CURRENT, [option], None, _hysteresis(threshold=0.01))
    assert decided.reason == f"re-split promises 1.250 s, 0.500 less per request, {costs}"
    exceeded = replace(CURRENT, exceeded="memory of fast")
    assert _choose_by_net_gain(exceeded, [option], None, _hysteresis()).reason.startswith("memory of fast; re-split")
    broken = replace(CURRENT, broken="no link")
    escape = _choose_escape(broken, [replace(option, gain_per_request=float("inf"))])
    assert escape.reason == f"the current placement cannot serve (no link); re-split promises 1.250 s, {costs}"


def test_a_broken_placement_without_a_plan_names_why_each_kind_of_plan_is_absent() -> None:
    plans = [Alternative("redistribute", None, reason="no memory"), Alternative("re-split", None, reason="no link")]
    choice = _choose_escape(replace(CURRENT, broken="lost"), plans)
    assert (choice.chosen, choice.urgent) == (KEEP, "lost")
    assert choice.reason == (
        "the current placement cannot serve (lost), and there is no alternative: "
        "redistribute: no memory; re-split: no link"
    )


def test_a_placement_that_exceeds_a_limit_is_kept_with_the_limit_as_the_reason_if_there_is_no_plan() -> None:
    choice = _choose_by_net_gain(
        replace(CURRENT, exceeded="memory of fast"), [replace(OTHER, placement=None)], MISSED, _hysteresis()
    )
    assert choice.chosen is KEEP
    assert choice.reason == "no alternative gains more than its move costs, although memory of fast"


def test_a_missed_objective_is_the_reason_why_a_choice_is_urgent() -> None:
    urgent = "a service objective is missed (chat)"
    assert _choose_by_net_gain(CURRENT, [OTHER], MISSED, _hysteresis()).urgent == urgent
    assert _choose_by_net_gain(CURRENT, [OTHER], MISSED, _hysteresis(threshold=0.2)).urgent == urgent
    assert _choose_by_net_gain(CURRENT, [replace(OTHER, net_gain=0.0)], MISSED, _hysteresis()).urgent == urgent
    recent = _hysteresis(History(replace(_moved(), at_s=999.0)))
    assert _choose_by_net_gain(CURRENT, [OTHER], MISSED, recent).chosen is OTHER


def test_without_any_move_yet_there_is_no_cooldown() -> None:
    assert _hysteresis(now_s=0.0).objection(OTHER, CURRENT, waive_cooldown=False) == ""


def _on_trial(now_s: float = 1000.0, **measured: float) -> Decision:
    """A decision after a move of 990 s, before which requests took 1 s."""
    seen = replace(Measured(1.5, 20), **measured)  # type: ignore[arg-type]
    return _decide(problem(halves(FAST, SLOW, 4)), now_s, history=History(_moved()), measured=seen)


def test_a_trial_lasts_to_its_last_second_and_the_least_number_of_requests_can_judge_it() -> None:
    assert _on_trial(990.0 + SETTINGS.trial_s).action == "rollback"
    assert _on_trial(requests=SETTINGS.trial_requests).action == "rollback"


@pytest.mark.parametrize(
    ("latency_s", "error_s", "action"),
    [(1.16, 0.0, "rollback"), (1.14, 0.0, "keep"), (1.36, 0.1, "rollback"), (1.34, 0.1, "keep")],
)
def test_a_trial_fails_if_latency_exceeds_the_margin_by_two_standard_errors(
    latency_s: float, error_s: float, action: str
) -> None:
    decision = _on_trial(latency_s=latency_s, error_s=error_s)
    assert (decision.action == "rollback") == (action == "rollback")


def test_the_error_of_the_latency_before_the_move_counts_in_a_trial_too() -> None:
    history = History(replace(_moved(), error_before_s=0.08))
    latencies_s = {1.34: False, 1.36: True}  # two errors of hypot(0.06, 0.08) above 1.15 are 1.35
    for latency_s, failed in latencies_s.items():
        measured = Measured(latency_s, 20, error_s=0.06)
        decision = _decide(problem(halves(FAST, SLOW, 4)), history=history, measured=measured)
        assert (decision.action == "rollback") == failed


def test_a_rollback_is_one_of_the_alternatives_and_its_reason_compares_the_latencies() -> None:
    decision = _on_trial()
    assert [option.action for option in decision.alternatives] == ["keep", "redistribute", "re-split", "rollback"]
    assert decision.chosen is decision.alternatives[3]
    assert decision.urgent == "the last move made latency worse"
    assert decision.reason == (
        "since the last move (re-split) requests take 1.500 s; without it they would take 1.000 s: "
        "back to the placement before it"
    )


def test_a_move_from_a_node_that_is_gone_is_not_rolled_back() -> None:
    history = History(replace(_moved(), before=(*BEST[:-1], "gone")))
    decision = _decide(problem(halves(FAST, SLOW, 4)), history=history, measured=Measured(1.5, 20))
    assert "rollback" not in {option.action for option in decision.alternatives}


def test_without_a_stated_uncertainty_the_threshold_is_that_of_the_settings() -> None:
    decision = decide(problem(BEST), now_s=0.0, settings=SETTINGS, history=NO_HISTORY, solve=lambda *_, **__: NO_PLAN)
    assert (decision.uncertainty, decision.threshold) == (0.0, SETTINGS.threshold)


def _busy(cluster: Problem, share: float) -> Problem:
    return replace(cluster, nodes=tuple(replace(node, background_utilization=share) for node in cluster.nodes))


def test_where_no_plan_keeps_the_ceilings_a_better_one_above_them_is_chosen_and_the_reason_says_so() -> None:
    cluster = _busy(problem(halves(SLOW, FAST, 6), rate_rps=0.05), 0.96)
    decision = _decide(cluster)
    assert decision.action == "re-split"
    assert decision.chosen is not None
    assert decision.chosen.latency_s < 0.9 * decision.alternatives[0].latency_s
    assert "no plan keeps max_utilization: fast is planned to be 97." in decision.reason


def test_a_placement_above_the_ceilings_is_kept_if_no_plan_keeps_them_and_none_is_better() -> None:
    decision = _decide(_busy(problem(BEST, rate_rps=0.05), 0.96))
    assert decision.action == "keep"
    assert decision.urgent == ""
    assert "no plan keeps max_utilization: " in decision.reason


def test_a_plan_within_the_ceilings_is_preferred_to_any_above_them() -> None:
    cluster = problem(halves(FAST, SLOW, 2), rate_rps=0.05)
    busy = tuple(replace(node, background_utilization=0.96) if node.name == FAR else node for node in cluster.nodes)
    decision = _decide(replace(cluster, nodes=busy))
    assert FAR not in decision.placement
    assert "max_utilization" not in decision.reason
