"""The default solver, `relax`: Lagrangian bounds, local search for plans, and branch and bound to close the gap.

docs/planner.md has the mathematics.
"""

from __future__ import annotations

import numpy as np

from resplit.planner.baselines import greedy
from resplit.planner.bound.branching import branch_and_bound
from resplit.planner.bound.dual import Dual
from resplit.planner.bound.mip import CLOCK_DELAY_S, candidates, solve_mip
from resplit.planner.bound.node_states import NodeStates
from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.bound.resources import Resources
from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate
from resplit.planner.infeasibility import infeasibility
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import OPTIMAL_GAP, Outcome
from resplit.planner.search.local_search import LocalSearch

__all__ = ["solve"]

PATHS_PER_ROUND = 12  # priced between two descents
MAX_FAILED_RUNS = 3  # consecutive annealing runs without improvement, each twice as long as the one before
MAX_RUNS, MAX_RUNS_WITHOUT_PLAN = 5, 6  # annealing runs; the second if they have found no plan
IMPROVEMENT = 1e-9  # relative
MIN_MIP_S = 0.15  # the time HiGHS takes to start
MAX_CANDIDATES = 15_000  # intervals and hops in a mixed-integer program
# Shares of the budget that is left when a step begins.
FIRST_PRICING_SHARE, ANNEALING_SHARE = 0.1, 0.85
PRICING_SHARE, BRANCHING_SHARE, DESCENT_SHARE = 0.4, 0.95, 0.1
SMALL_MIP_SHARE, SMALL_MIP_CANDIDATES = 0.4, 1_200  # for an early mixed-integer program, if it is this small
NO_PLAN_MIP_SHARE = 0.7  # for a mixed-integer program if no plan is known


def solve(instance: Instance, budget: Budget, start: IntArray | None = None, gap: float = OPTIMAL_GAP / 4) -> Outcome:
    """Find the best placement and prove the best bound within `budget`, until their relative gap is at most `gap`.

    `start` (A,) is a placement to start from, with -1 for an atom without a node.
    """
    return solve_from(instance, budget, start, gap)[0]


def solve_from(
    instance: Instance, budget: Budget, start: IntArray | None, gap: float, previous: Dual | None = None
) -> tuple[Outcome, Dual]:
    """Like `solve`, starting from the prices of `previous` if given. Returns the final prices too."""
    paths = IntervalPaths(instance)
    dual = Dual(instance, paths, Resources.of(instance).tightened(instance, NodeStates.of(instance)))
    value, first = dual.evaluate(dual.prices)
    if not len(first):
        reason = infeasibility(instance) or "no chain of linked nodes can hold all blocks in order"
        return Outcome(None, float("inf"), reason), dual
    if previous is not None:
        dual.warm_start(previous)
    search = LocalSearch(instance, value)
    _first_descents(search, first, start, budget)
    _generate_columns(dual, search, budget.part(FIRST_PRICING_SHARE), gap)
    _anneal(dual, search, first, budget.part(ANNEALING_SHARE), gap)
    _generate_columns(dual, search, budget.part(PRICING_SHARE), gap)
    if search.best is None and _solve_mips(dual, search, budget.part(NO_PLAN_MIP_SHARE), gap) == float("inf"):
        return _outcome(instance, search, float("inf")), dual
    bound = _close_gap(dual, search, budget, gap)
    if bound < search.cost * (1 - gap):
        _anneal(dual, search, first, budget, gap)
    return _outcome(instance, search, bound), dual


def _first_descents(search: LocalSearch, first: IntArray, start: IntArray | None, budget: Budget) -> None:
    """Search from `start` if given, else from `first`, the cheapest path (A,); record greedy's placement if needed."""
    search.record(first)
    if start is not None:
        start = np.where(start < 0, first, start)
        search.record(start)
        search.descend(start, budget)
    if search.best is None and (quick := greedy.solve(search.instance, budget).nodes_of) is not None:
        search.record(quick)
    search.descend(first, budget.part(DESCENT_SHARE))


def _close_gap(dual: Dual, search: LocalSearch, budget: Budget, gap: float) -> float:
    """Prove a better bound, and find better plans: a small program, branch and bound, then a large program."""
    bound = _solve_mips(dual, search, budget.part(SMALL_MIP_SHARE), gap, SMALL_MIP_CANDIDATES)
    if bound < search.cost * (1 - gap):
        part = budget.part(BRANCHING_SHARE)
        branched = branch_and_bound(
            dual, lambda each: _generate_columns(each, search, part, gap), lambda: search.cost * (1 - gap), part
        )
        bound = max(bound, branched)
    if bound < search.cost * (1 - gap):
        bound = max(bound, _solve_mips(dual, search, budget, gap))
    return bound


def _solve_mips(
    dual: Dual, search: LocalSearch, budget: Budget, gap: float, max_candidates: int = MAX_CANDIDATES
) -> float:
    """Solve mixed-integer programs of at most `max_candidates`, with falling cutoffs. Returns the bound."""
    bound = dual.bound
    while budget.left_s > MIN_MIP_S and not budget.spent and bound < search.cost * (1 - gap):
        before = search.cost
        chosen = candidates(dual, search.cost)
        if len(chosen) > max_candidates or budget.left_s < MIN_MIP_S + 2 * CLOCK_DELAY_S * len(chosen):
            break
        if not budget.spend(len(chosen)):
            break
        nodes_of, bound = solve_mip(dual, chosen, search.cost, budget, search.best, gap)
        if nodes_of is None:
            break
        search.descend(nodes_of, budget)
        search.record(nodes_of)
        if not search.cost < before:
            break
    return bound


def _generate_columns(dual: Dual, search: LocalSearch, budget: Budget, gap: float) -> None:
    """Generate columns in rounds until the prices have converged, with occasional descents from the last path."""
    rounds = 0
    columns = [search.best] if search.best is not None else []
    while dual.bound < search.cost * (1 - gap):
        found = dual.generate_columns(columns, budget, search.cost * (1 - gap / 2), PATHS_PER_ROUND)
        if not found and (dual.converged or budget.spent):
            break
        rounds += 1
        known = search.cost
        if found and rounds & (rounds - 1) == 0:  # ever more rarely, as pricing is much faster
            search.descend(found[-1], budget.part(DESCENT_SHARE))
        columns = [search.best] if search.best is not None and search.cost < known else []


def _anneal(dual: Dual, search: LocalSearch, first: IntArray, budget: Budget, gap: float) -> None:
    """Run annealing until several consecutive runs failed; it starts from `first` if no legal placement is known."""
    runs, failed = 0, 0
    while runs < (MAX_RUNS_WITHOUT_PLAN if search.best is None else MAX_RUNS) and failed < MAX_FAILED_RUNS:
        if budget.spent or dual.bound >= search.cost * (1 - gap):
            break
        known = search.cost
        search.anneal(first, budget)
        runs += 1
        failed = 0 if search.best is None or search.cost < known * (1 - IMPROVEMENT) else failed + 1


def _outcome(instance: Instance, search: LocalSearch, bound: float) -> Outcome:
    if search.best is not None:
        others = tuple(nodes_of for _, nodes_of in search.legal.values())
        return Outcome(search.best, bound, others=others)
    if found := infeasibility(instance):
        return Outcome(None, float("inf"), found)
    nearest = _least_violating_text(instance, search)
    if bound == float("inf"):
        return Outcome(None, bound, f"memory, ceilings, trust and links conflict; {nearest}")
    return Outcome(
        None, bound, f"local search and branching found no placement in time, and no proof that none exists; {nearest}"
    )


def _least_violating_text(instance: Instance, search: LocalSearch) -> str:
    if search.least_violating is None:
        return "no placement was found that violates only memory and ceilings"
    violations = evaluate(instance.problem, instance.placement(search.least_violating)).violations
    return f"the placement with the least excess violates {'; '.join(each.text for each in violations)}"
