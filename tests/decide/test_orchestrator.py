"""Keep, redistribute, re-split, roll back."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from resplit.decide import Decision, History, Measured, PastMove, Settings, decide
from resplit.errors import DataError
from resplit.planner.evaluate import evaluate
from resplit.types import Plan, Problem
from tests.support.decisions import FAR, FAST, SETTINGS, SLOW, halves, noisy, problem, random_problem

NOTHING_YET = History()
TODAY = halves(FAST, SLOW, 6)  # the best there is: all that the fast node can hold on it


def _decide(
    cluster: Problem,
    now_s: float = 1000.0,
    options: Settings = SETTINGS,
    history: History = NOTHING_YET,
    uncertainty: float = 0.02,
    measured: Measured | None = None,
) -> Decision:
    return decide(cluster, now_s=now_s, settings=options, history=history, uncertainty=uncertainty, measured=measured)


def _latency_s(cluster: Problem, placement: tuple[str, ...]) -> float:
    return evaluate(cluster, placement).terms.latency_s


def _moved(action: str = "re-split", before: tuple[str, ...] = TODAY, before_s: float | None = 1.0) -> PastMove:
    return PastMove(990.0, action, before, halves(FAST, SLOW, 4), before_s, _latency_s(problem(before), before))


def test_the_best_placement_is_kept() -> None:
    decision = _decide(problem(TODAY))
    assert decision.action == "keep"
    assert decision.placement == TODAY
    assert [option.action for option in decision.alternatives] == ["keep", "redistribute", "re-split"]


def test_a_shifted_cut_is_a_re_split_and_worth_its_move() -> None:
    decision = _decide(problem(halves(FAST, SLOW, 2)))
    assert decision.action == "re-split"
    assert decision.placement == TODAY
    assert decision.chosen.net_gain > 0
    assert decision.chosen.weight_bytes == 4 * 20e6


def test_nodes_changed_under_the_same_cuts_are_a_redistribution() -> None:
    cluster = problem(halves(SLOW, FAR, 6))
    roomy = tuple(replace(node, memory_bytes=8 * 21e6) if node.name == SLOW else node for node in cluster.nodes)
    decision = _decide(replace(cluster, nodes=roomy))  # with room for old and new blocks at once
    redistribution = decision.alternatives[1]
    assert redistribution.placement == TODAY
    assert decision.action == "redistribute"  # as good as the best re-split, and the smaller change


def test_a_gain_that_the_transfer_eats_up_is_not_taken() -> None:
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


def test_within_the_cooldown_no_move_is_made_for_its_own_sake() -> None:
    cluster = problem(halves(FAST, SLOW, 2))
    history = History(PastMove(990.0, "re-split", TODAY, halves(FAST, SLOW, 2), None, 1.0))
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
    "a lost node": _lost(problem(TODAY), SLOW),
    "a node that is gone": problem((*TODAY[:-1], "gone")),
    "a broken privacy rule": problem(halves(FAR, FAST)),
    "an overloaded node": problem(halves(SLOW, FAST, 6), rate_rps=2.5, decode_s=(1e-3, 2e-3 * 1.5, 4e-3)),
}


@pytest.mark.parametrize("case", URGENT)
def test_what_cannot_go_on_is_left_at_once_whatever_the_cooldown_and_the_bars_say(case: str) -> None:
    cluster = URGENT[case]
    assert cluster.current is not None
    history = History(PastMove(999.0, "re-split", TODAY, cluster.current, None, 1.0))
    decision = _decide(cluster, history=history, uncertainty=0.9)
    assert decision.action != "keep"
    assert decision.urgent
    assert decision.urgent in decision.reason
    assert evaluate(cluster, decision.placement).violations == ()
    again = replace(history, barred=()).moved(replace(decision.move(999.5), action="rollback"), SETTINGS)
    assert _decide(cluster, history=again).placement == decision.placement


def test_an_escape_is_not_on_trial() -> None:
    decision = _decide(URGENT["a lost node"], measured=Measured(1.0, 50))
    assert decision.move(1000.0).latency_before_s is None


def test_where_nothing_else_is_possible_today_is_kept_and_the_reason_says_why() -> None:
    only_far = _lost(_lost(problem(TODAY), SLOW), FAST)
    decision = _decide(only_far)
    assert decision.action == "keep"
    assert "cannot go on" in decision.reason
    assert "nothing else can be done" in decision.reason
    json.loads(decision.to_json())


def test_a_limit_that_is_exceeded_is_left_without_gain_but_not_within_the_cooldown() -> None:
    cluster = problem(TODAY)
    tight = replace(cluster, nodes=(replace(cluster.nodes[0], memory_bytes=4.5 * 21e6), *cluster.nodes[1:]))
    decision = _decide(tight)
    assert decision.action == "re-split"
    assert decision.chosen.gain_per_request < 0
    assert "memory of fast" in decision.reason
    history = History(PastMove(999.0, "re-split", halves(SLOW, FAST), TODAY, None, 1.0))
    assert _decide(tight, history=history).action == "keep"


def _with_slo(cluster: Problem, slo_s: float) -> Problem:
    return replace(cluster, classes=(replace(cluster.classes[0], slo_s=slo_s),))


def test_a_missed_objective_sets_the_cooldown_aside_where_it_can_be_met() -> None:
    current = halves(FAST, SLOW, 2)
    history = History(PastMove(999.0, "re-split", TODAY, current, None, 1.0))
    slo_s = 1.05 * _latency_s(problem(TODAY), TODAY)
    assert _decide(problem(current), history=history).action == "keep"
    decision = _decide(_with_slo(problem(current), slo_s), history=history)
    assert decision.action == "re-split"
    assert "objective" in decision.urgent
    out_of_reach = _with_slo(problem(TODAY), 0.01 * slo_s)
    assert _decide(out_of_reach, history=history).urgent == ""


def test_a_move_that_made_things_worse_is_undone_and_not_tried_again_for_a_while() -> None:
    worse = problem(halves(FAST, SLOW, 4))
    history = History(_moved())
    decision = _decide(worse, history=history, measured=Measured(1.5, 20))
    assert decision.action == "rollback"
    assert decision.placement == TODAY
    after = history.moved(decision.move(1000.0), SETTINGS)
    assert after.bars(halves(FAST, SLOW, 4), 1000.0 + SETTINGS.bar_s - 1)
    assert not after.bars(halves(FAST, SLOW, 4), 1000.0 + SETTINGS.bar_s)
    assert not after.bars(TODAY, 1001.0)


def test_a_barred_placement_is_not_chosen_however_much_it_promises() -> None:
    current = halves(FAST, SLOW, 2)
    history = History().moved(PastMove(500.0, "rollback", TODAY, current, None, 1.0), SETTINGS)
    decision = _decide(problem(current), history=history)
    assert decision.placement not in (TODAY,)
    free = _decide(problem(current), now_s=500.0 + SETTINGS.bar_s, history=history)
    assert free.placement == TODAY


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
        "no before",
        "trial over",
        "a rollback",
        "illegal",
        "control",
    ],
)
def test_a_rollback_needs_a_trial_that_failed(
    history: History, measured: Measured | None, now_s: float, request: pytest.FixtureRequest
) -> None:
    action = _decide(problem(halves(FAST, SLOW, 4)), now_s, history=history, measured=measured).action
    assert (action == "rollback") == ("control" in request.node.name)


def test_a_placement_that_is_not_the_outcome_of_the_last_move_is_not_undone_for_it() -> None:
    elsewhere = replace(_moved(), after=halves(FAST, SLOW, 3))  # the controller has moved since, on its own
    decision = _decide(problem(halves(FAST, SLOW, 4)), history=History(elsewhere), measured=Measured(1.5, 20))
    assert decision.action != "rollback"


def test_a_plan_that_breaks_a_rule_is_not_taken_whoever_made_it() -> None:
    def careless(cluster: Problem, **_: object) -> Plan:
        return Plan("optimal", "careless", 0.0, placement=halves(FAR, FAST))

    cluster = problem(halves(SLOW, FAR, 6))
    decision = decide(cluster, now_s=0.0, settings=SETTINGS, history=NOTHING_YET, solve=careless)
    assert decision.action == "keep"
    assert "trust" in (decision.alternatives[2].reason or "")


def test_a_surge_that_would_have_slowed_the_old_placement_as_much_undoes_nothing() -> None:
    surged = problem(halves(FAST, SLOW, 4), rate_rps=1.9)
    ratio = _latency_s(replace(surged, current=TODAY), TODAY) / _latency_s(problem(TODAY), TODAY)
    assert ratio > 1.3
    decision = _decide(surged, history=History(_moved()), measured=Measured(1.05 * ratio, 20))
    assert decision.action != "rollback"


def test_a_decision_says_what_it_saw_as_json() -> None:
    decision = _decide(URGENT["a lost node"], measured=Measured(1.5, 20, ("chat",)))
    plain = json.loads(decision.to_json())
    assert plain["action"] == decision.action
    assert plain["chosen"]["placement"] == list(decision.placement)
    assert plain["alternatives"][0]["horizon_cost"] is None
    assert [node["usable"] for node in plain["nodes"]] == [True, False, True]
    assert plain["rates_rps"] == {"chat": 0.5}
    assert plain["measured"]["slo_missed"] == ["chat"]
    assert plain["reason"]


def test_without_a_current_placement_there_is_nothing_to_decide() -> None:
    with pytest.raises(DataError, match="nothing is placed"):
        _decide(replace(problem(TODAY), current=None))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6))
def test_keep_where_nothing_gains_and_never_an_illegal_placement(seed: int) -> None:
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


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_same_state_gives_the_same_decision(seed: int) -> None:
    assert _decide(random_problem(seed)).to_json() == _decide(random_problem(seed)).to_json()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_was_moved_to_is_kept_in_the_next_tick(seed: int) -> None:
    cluster = random_problem(seed)
    first = _decide(cluster)
    assume(first.action != "keep")
    second = _decide(replace(cluster, current=first.placement), now_s=5000.0)
    assert second.action == "keep"


def _moves_of_a_run(options: Settings, uncertainty: float, seed: int) -> list[int]:
    """The ticks at which a cluster of three nearly equal nodes is moved, seen through noise that means nothing."""
    rng = np.random.default_rng(seed)
    truth = problem(halves(SLOW, FAST, 5), decode_s=(1e-3, 1.03e-3, 1.06e-3))
    history, moves = History(), []
    for tick in range(60):
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
def test_a_noisy_but_stationary_state_settles_and_stays(seed: int) -> None:
    moves = _moves_of_a_run(SETTINGS, 0.05, seed)
    assert len(moves) <= 2
    assert all(tick < 20 for tick in moves)


def test_without_a_threshold_and_a_cooldown_the_same_noise_makes_it_flap() -> None:
    nervous = replace(SETTINGS, threshold=0.0, uncertainty_weight=0.0, cooldown_s=0.0)
    assert len(_moves_of_a_run(nervous, 0.05, 0)) > 5
