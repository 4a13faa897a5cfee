"""Chooses among plans of nearly equal cost: first more met service objectives, then fewer moved bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate, moved_bytes, slo_shortfall_s
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome
from resplit.planner.search.descent import Descent
from resplit.types import FloatArray

__all__ = ["preferred"]

TIE = 1e-9  # relative
EVALUATED_MOVES = 200  # per step of the hill climbing

# Classes that miss their service objective, bytes moved (or the shortfall in seconds), objective.
Rank = tuple[int, float, float]


def preferred(instance: Instance, outcome: Outcome, tolerance: float, budget: Budget) -> Outcome:
    """`outcome` with the preferred placement among those whose cost is within `tolerance` (relative) of its own.

    Candidates are the placements that the solver found and the current placement. If `tolerance` is above 0, interval
    moves improve the best of them further.
    """
    problem = instance.problem
    has_preferences = problem.current is not None or any(c.slo_s is not None for c in problem.classes)
    if outcome.nodes_of is None or not has_preferences or instance.cost(outcome.nodes_of) == float("inf"):
        return outcome
    limit = instance.cost(outcome.nodes_of) * (1 + max(tolerance, TIE))
    known = [outcome.nodes_of, *outcome.others]
    if problem.current is not None:
        current = instance.nodes_of(problem.current)
        known += [current] if (current >= 0).all() else []
    within = [nodes_of for nodes_of in known if instance.cost(nodes_of) <= limit]
    best = min(within, key=lambda nodes_of: _rank(instance, nodes_of))
    if tolerance > 0:
        faster = _hill_climb(instance, best, limit, budget, _rank_by_shortfall)
        best = min((best, faster), key=lambda nodes_of: _rank(instance, nodes_of)[0])
        best = _hill_climb(instance, best, limit, budget, _rank)
    return replace(outcome, nodes_of=best)


def _rank(instance: Instance, nodes_of: IntArray) -> Rank:
    """The order of preference; the placement with the least rank is preferred."""
    placement = instance.placement(nodes_of)
    evaluation = evaluate(instance.problem, placement)
    missed = slo_shortfall_s(instance.problem, evaluation)
    return len(missed), moved_bytes(instance.problem, placement) or 0.0, evaluation.objective


def _rank_by_shortfall(instance: Instance, nodes_of: IntArray) -> Rank:
    """Like `_rank`, with the shortfall in seconds in place of the bytes moved."""
    evaluation = evaluate(instance.problem, instance.placement(nodes_of))
    missed = slo_shortfall_s(instance.problem, evaluation)
    return len(missed), sum(missed.values()), evaluation.objective


def _hill_climb(
    instance: Instance, nodes_of: IntArray, limit: float, budget: Budget, key: Callable[[Instance, IntArray], Rank]
) -> IntArray:
    """Hill climbing by interval moves within the cost `limit`, until no move improves `key` or its middle part is 0."""
    moves = Descent(instance, 3 * limit or 1.0)
    best = key(instance, nodes_of)
    while best[1] > 0 and budget.spend():
        slack = limit - instance.cost(nodes_of)
        for move, node in _promising(instance, moves, nodes_of, slack, cheapest=key is _rank_by_shortfall):
            changed = moves.apply_move(nodes_of, move, node)
            if instance.cost(changed) <= limit and (new := key(instance, changed)) < best:
                nodes_of, best = changed, new
                break
        else:
            break
    return nodes_of


def _promising(
    instance: Instance, moves: Descent, nodes_of: IntArray, slack: float, cheapest: bool
) -> list[tuple[int, int]]:
    """Moves (index, node) that cost at most `slack`: by cost if `cheapest`, else by the moved bytes that they save."""
    delta = moves.deltas(nodes_of)
    order = np.where(delta <= slack, delta if cheapest else -_saved_bytes(instance, moves, nodes_of), np.inf)
    best = np.argsort(order, axis=None, kind="stable")[:EVALUATED_MOVES]
    pairs = [divmod(int(index), delta.shape[1]) for index in best]
    return [(move, node) for move, node in pairs if order[move, node] < (np.inf if cheapest else 0)]


def _saved_bytes(instance: Instance, moves: Descent, nodes_of: IntArray) -> FloatArray:
    """Bytes that no longer move from the current placement after each interval move (M, N)."""
    current = instance.problem.current
    if current is None:
        return np.zeros((1, 1))
    current_nodes = instance.nodes_of(current)
    away = np.where(current_nodes[:, None] == np.arange(instance.shape[1]), 0, instance.memory[:, None])  # (A, N)
    now = away[np.arange(len(nodes_of)), nodes_of]
    saved: FloatArray = moves.interval_sums(now[:, None] - away)
    return saved
