"""Decisions where something was prepared for likely changes: placements, and blocks that are loaded already."""

from __future__ import annotations

from dataclasses import replace

from resplit.decide import History, Ready, Settings, decide
from resplit.types import Plan, Problem
from tests.support.decisions import FAST, SETTINGS, SLOW, halves, problem

NO_HISTORY = History()
BEST = halves(FAST, SLOW, 6)  # the fast node holds as many blocks as it can
BEST_PLAN = Plan("optimal", "test", 0.0, placement=BEST)
NO_PLAN = Plan("infeasible", "test", 0.0)


def test_a_placement_that_is_ready_is_taken_if_it_costs_less_over_the_horizon_its_move_included() -> None:
    cluster = problem(halves(FAST, SLOW, 2))
    worse = halves(FAST, SLOW, 5)
    ready = Ready((worse,), frozenset((block, FAST) for block in range(8)))
    slowly = replace(SETTINGS, registry_bytes_per_s=1e6)  # to load the better one takes most of the horizon

    def planned(settings: Settings, ready: Ready) -> tuple[str, ...]:
        decision = decide(
            cluster, now_s=0.0, settings=settings, history=NO_HISTORY, ready=ready, solve=lambda *_, **__: BEST_PLAN
        )
        return decision.alternatives[2].placement or ()

    assert planned(slowly, Ready()) == BEST
    assert planned(slowly, Ready((worse,), ready.loaded - {(5, FAST)})) == worse
    assert planned(SETTINGS, ready) == BEST


def test_a_placement_that_is_ready_counts_where_the_solver_finds_none_unless_it_is_not_legal() -> None:
    cluster, legal, full = problem(halves(FAST, SLOW, 2)), BEST, (FAST,) * 8
    for ready, found in (((full, legal), legal), ((full,), None)):
        decision = decide(
            cluster,
            now_s=0.0,
            settings=SETTINGS,
            history=NO_HISTORY,
            ready=Ready(ready),
            solve=lambda *_, **__: NO_PLAN,
        )
        assert decision.alternatives[2].placement == found


def test_the_search_starts_from_placements_that_are_ready_under_the_cuts_that_are_allowed() -> None:
    starts: list[object] = []

    def solver(posed: Problem, **arguments: object) -> Plan:
        starts.append(arguments.get("starts"))
        return NO_PLAN

    current, same_cuts, other_cuts = halves(FAST, SLOW, 2), halves(SLOW, FAST, 2), halves(FAST, SLOW, 4)
    ready = Ready((same_cuts, other_cuts))
    decide(problem(current), now_s=0.0, settings=SETTINGS, history=NO_HISTORY, ready=ready, solve=solver)
    assert starts[:2] == [[same_cuts], [same_cuts, other_cuts]]
