"""Trial and rollback: when a deployed move counts as a failure, and what is barred after it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resplit.decide import Decision, History, Measured, PastMove
from tests.support.decisions import (
    BEST,
    FAR,
    FAST,
    SETTINGS,
    SLOW,
    decide_on,
    halves,
    moved,
    predicted_s,
    problem,
)


def test_a_move_that_made_latency_worse_is_rolled_back_and_barred() -> None:
    worse = problem(halves(FAST, SLOW, 4))
    history = History(moved())
    decision = decide_on(worse, history=history, measured=Measured(1.5, 20))
    assert decision.action == "rollback"
    assert decision.placement == BEST
    after = history.moved(decision.move(1000.0), SETTINGS)
    assert after.bars(halves(FAST, SLOW, 4), 1000.0 + SETTINGS.bar_s - 1)
    assert not after.bars(halves(FAST, SLOW, 4), 1000.0 + SETTINGS.bar_s)
    assert not after.bars(BEST, 1001.0)


def test_a_barred_placement_is_not_chosen_even_if_its_gain_is_large() -> None:
    current = halves(FAST, SLOW, 2)
    history = History().moved(PastMove(500.0, "rollback", BEST, current, None, 1.0), SETTINGS)
    decision = decide_on(problem(current), history=history)
    assert decision.placement != BEST
    free = decide_on(problem(current), now_s=500.0 + SETTINGS.bar_s, history=history)
    assert free.placement == BEST


@pytest.mark.parametrize(
    ("history", "measured", "now_s"),
    [
        (History(moved()), Measured(1.1, 20), 1000.0),
        (History(moved()), Measured(1.5, SETTINGS.trial_requests - 1), 1000.0),
        (History(moved()), Measured(1.5, 20, error_s=0.2), 1000.0),
        (History(replace(moved(), error_before_s=0.2)), Measured(1.5, 20), 1000.0),
        (History(moved()), None, 1000.0),
        (History(moved(before_s=None)), Measured(1.5, 20), 1000.0),
        (History(moved()), Measured(1.5, 20), 991.0 + SETTINGS.trial_s),
        (History(moved(action="rollback")), Measured(1.5, 20), 1000.0),
        (History(moved(before=halves(FAR, FAST))), Measured(1.5, 20), 1000.0),
        (History(moved(before=halves(FAST, SLOW, 5))), Measured(1.5, 20), 1000.0),
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
    action = decide_on(problem(halves(FAST, SLOW, 4)), now_s, history=history, measured=measured).action
    assert (action == "rollback") == ("failed trial" in request.node.name)


def test_a_placement_that_does_not_come_from_the_last_move_is_not_rolled_back() -> None:
    elsewhere = replace(moved(), after=halves(FAST, SLOW, 3))  # the controller moved it since
    decision = decide_on(problem(halves(FAST, SLOW, 4)), history=History(elsewhere), measured=Measured(1.5, 20))
    assert decision.action != "rollback"


def test_a_surge_that_would_have_slowed_the_old_placement_as_much_causes_no_rollback() -> None:
    surged = problem(halves(FAST, SLOW, 4), rate_rps=1.9)
    ratio = predicted_s(replace(surged, current=BEST), BEST) / predicted_s(problem(BEST), BEST)
    assert ratio > 1.3
    decision = decide_on(surged, history=History(moved()), measured=Measured(1.05 * ratio, 20))
    assert decision.action != "rollback"


def _on_trial(now_s: float = 1000.0, **measured: float) -> Decision:
    """A decision after a move of 990 s, before which requests took 1 s."""
    seen = replace(Measured(1.5, 20), **measured)  # type: ignore[arg-type]
    return decide_on(problem(halves(FAST, SLOW, 4)), now_s, history=History(moved()), measured=seen)


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
    history = History(replace(moved(), error_before_s=0.08))
    latencies_s = {1.34: False, 1.36: True}  # two errors of hypot(0.06, 0.08) above 1.15 are 1.35
    for latency_s, failed in latencies_s.items():
        measured = Measured(latency_s, 20, error_s=0.06)
        decision = decide_on(problem(halves(FAST, SLOW, 4)), history=history, measured=measured)
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
    history = History(replace(moved(), before=(*BEST[:-1], "gone")))
    decision = decide_on(problem(halves(FAST, SLOW, 4)), history=history, measured=Measured(1.5, 20))
    assert "rollback" not in {option.action for option in decision.alternatives}


def test_a_latency_that_is_exactly_at_the_margin_is_no_failed_trial() -> None:
    options = replace(SETTINGS, rollback_margin=0.5)  # exact in binary, as are 1 s and 1.5 s
    for seconds, failed in ((1.5, False), (1.5078125, True)):
        measured = Measured(seconds, 20)
        decision = decide_on(
            problem(halves(FAST, SLOW, 4)), options=options, history=History(moved()), measured=measured
        )
        assert (decision.action == "rollback") == failed


def test_a_price_close_to_full_load_does_not_make_the_latency_before_the_move_look_good() -> None:
    """Requests that had not yet waited were measured at 1 s, while the old placement was priced at 40 s."""
    last = replace(moved(before=halves(FAST, SLOW, 4)), after=BEST, predicted_before_s=40.0)
    measured = Measured(predicted_s(problem(BEST), BEST), 20)
    decision = decide_on(problem(BEST), history=History(last), measured=measured)
    assert decision.action != "rollback"
