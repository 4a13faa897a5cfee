"""Plans for clusters of hundreds of nodes: over a shortlist of them, so that a plan takes as long as for a few dozen.

A chain uses a handful of nodes. Those that are slow, small or far from all that a placement has to touch are no
candidates. The plan is one for all nodes, but what is proven about it holds for the shortlist only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from resplit.planner import solve
from resplit.planner.evaluate import block_bytes
from resplit.planner.mean_request import block_seconds, link_seconds
from resplit.types import FloatArray, Plan, Problem

__all__ = ["SHORTLISTED", "restricted", "shortlist", "solve_shortlisted"]

SHORTLISTED = 24  # nodes
_TRUSTED = 6  # of them at most, if no others come first


def solve_shortlisted(
    problem: Problem,
    *,
    solver: str = "relax",
    time_limit_s: float = 10.0,
    work_limit: int | None = None,
    tolerance: float = 0.0,
    starts: Sequence[tuple[str, ...]] = (),
) -> Plan:
    """`resplit.planner.solve` over the shortlist, and over all nodes where the shortlist has no plan.

    A plan over the shortlist states no lower bound, because it is not one for all nodes.
    """
    posed = shortlist(problem, {name for start in starts for name in start})
    for attempt in (posed, problem):
        plan = solve(
            attempt, solver=solver, time_limit_s=time_limit_s, work_limit=work_limit, tolerance=tolerance, starts=starts
        )
        if attempt is problem:
            return plan
        if plan.placement is not None:
            return replace(plan, status="feasible", lower_bound=None, gap=None)
    return plan


def shortlist(problem: Problem, kept: Collection[str] = (), most: int = SHORTLISTED) -> Problem:
    """`problem` with about `most` of its nodes: sources, holders of blocks, `kept`, and then the best by `_scores`.

    A few trusted nodes are among them, because private blocks need them. A problem that is small enough stays as it is.
    """
    if len(problem.nodes) <= most:
        return problem
    names = [node.name for node in problem.nodes]
    needed = {each.source for each in problem.classes} | set(problem.current or ()) | set(kept)
    chosen = {index for index, name in enumerate(names) if name in needed}
    trusted = np.array([node.trusted for node in problem.nodes])
    chosen |= set(_best(np.where(trusted, _scores(problem, sorted(chosen)), np.inf), _TRUSTED))
    while len(chosen) < most:  # each half may lead to better ones beyond it
        scores = _scores(problem, sorted(chosen))
        scores[sorted(chosen)] = np.inf
        found = _best(scores, (most - len(chosen) + 1) // 2)
        if not found:
            break
        chosen |= set(found)
    return restricted(problem, sorted(chosen))


def _best(scores: FloatArray, most: int) -> list[int]:
    """The indices of the least finite scores."""
    return [int(index) for index in np.argsort(scores, kind="stable")[:most] if np.isfinite(scores[index])]


def _scores(problem: Problem, core: Sequence[int]) -> FloatArray:
    """What a block costs on each node (N,), in seconds of a request: its time there, and its part of the way.

    The way leads from the nearest node of `core` (indices) and back to it, and is shared by the blocks that the node
    has memory for. Infinite for a node that can run none.
    """
    times_s = block_seconds(problem)  # (J, N)
    runs = np.isfinite(times_s).any(axis=0)
    block_s = np.where(runs, np.nansum(times_s, axis=0) / np.maximum(1, np.isfinite(times_s).sum(axis=0)), np.inf)
    background = np.array([node.background_utilization for node in problem.nodes])
    memory = np.array([node.memory_bytes for node in problem.nodes])
    room = np.clip(memory // np.median(block_bytes(problem)), 0, len(problem.blocks))  # blocks
    link_s = link_seconds(problem)  # (N, N)
    link_s = np.where(np.isnan(link_s), np.inf, link_s)
    way_s = link_s[core].min(axis=0) + link_s[:, core].min(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = block_s / (1 - background) + way_s / room
    return np.where(room > 0, scores, np.inf)


def restricted(problem: Problem, chosen: Sequence[int]) -> Problem:
    """The problem with the nodes at these indices only."""
    pairs = np.ix_(chosen, chosen)
    return replace(
        problem,
        nodes=tuple(problem.nodes[index] for index in chosen),
        prefill_s_per_token=problem.prefill_s_per_token[:, chosen],
        decode_s_per_token=problem.decode_s_per_token[:, chosen],
        link_latency_s=problem.link_latency_s[pairs],
        link_bandwidth_bytes_per_s=problem.link_bandwidth_bytes_per_s[pairs],
    )
