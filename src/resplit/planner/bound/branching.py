"""Branch and bound with a Lagrangian dual in each subproblem (branch and price).

It branches on the fractional shares in the master's solution: of the nodes used, of the nodes of the first and the last
atom, and of the links crossed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np

from resplit.planner.bound.dual import Dual
from resplit.planner.bound.resources import SetCuts, Support
from resplit.planner.budget import Budget
from resplit.types import FloatArray

__all__ = ["branch_and_bound", "by_end", "by_link", "by_node"]

FEW_LABELS = 15_000  # of one pricing; with fewer labels, larger neighbourhoods cost little
MAX_NODES = 64  # with more nodes, branching on one node gains so little that neighbourhoods are always grown first
MIN_CLOSENESS = 0.05  # least distance of a share to 0 and 1; with less, branching gains nothing

Branches = tuple[Dual, Dual]


def branch_and_bound(
    root: Dual, improve_bound: Callable[[Dual], None], target: Callable[[], float], budget: Budget
) -> float:
    """The least bound of all open subproblems, after branching on `root` until `target` is reached.

    The subproblem with the least bound is branched on next. `improve_bound` raises the bound of one subproblem.
    """
    count, open_parts = 1, [(root.bound, 0, root)]
    while open_parts[0][0] < target() and not budget.spent:
        bound, number, part = heappop(open_parts)
        smaller = _replacements(part)
        if not smaller:
            heappush(open_parts, (bound, number, part))
            break
        for each in smaller:
            improve_bound(each)
            heappush(open_parts, (max(each.bound, bound), count, each))
            count += 1
    return open_parts[0][0]


def _replacements(part: Dual) -> Sequence[Dual]:
    """The subproblems to bound next in place of `part`; empty if its bound cannot be raised further.

    They are `part` with larger neighbourhoods if that is cheap or it cannot be branched on, else its two branches.
    """
    cheap = part.labels < FEW_LABELS or part.instance.shape[1] > MAX_NODES
    if (cheap or part.overflowed) and part.converged and part.grow_neighbourhoods():
        return [part]
    if halves := _split(part):
        return halves
    return [part] if part.converged and part.grow_neighbourhoods() else []


def by_node(part: Dual, node: int) -> Branches:
    """Branches: the placements without `node`, and the placements that use it."""
    forbidden = np.zeros_like(part.forbidden)
    forbidden[:, node] = True
    return part.subproblem(forbidden), part.subproblem(required=SetCuts.entry(forbidden.shape[1], node))


def by_end(part: Dual, atom: int, node: int) -> Branches:
    """Branches: the placements without `atom` (the first or the last) on `node`, and the placements with it there."""
    without, others = np.zeros_like(part.forbidden), np.zeros_like(part.forbidden)
    without[atom, node] = True
    others[atom] = ~without[atom]
    return part.subproblem(without), part.subproblem(others)


def by_link(part: Dual, origin: int, node: int) -> Branches:
    """Branches: the placements that never cross the link from `origin` to `node`, and the placements that cross it."""
    forbidden_links = np.zeros_like(part.forbidden_links)
    forbidden_links[origin, node] = True
    return part.subproblem(forbidden_links=forbidden_links), part.subproblem(
        required=SetCuts.entry(len(forbidden_links), node, origin)
    )


def _split(part: Dual) -> Branches | None:
    """Two branches on the share in the master's solution that is nearest to a half; None if all are near 0 or 1.

    Nodes are tried first, then the ends of the chain, then links: in this order they raise the bound most.
    """
    if not part.solution:
        return None
    atoms, nodes = part.instance.shape
    support = Support.of_solution(part.resources, part.solution)
    ends = np.zeros((2, nodes))  # the shares of the first and the last atom on each node
    for weight, nodes_of in part.solution:
        ends[[0, 1], nodes_of[[0, -1]]] += weight
    node, closeness = _nearest_to_half(support.starts + support.crossings.sum(axis=0))
    if closeness > MIN_CLOSENESS:
        return by_node(part, node)
    end, closeness = _nearest_to_half(ends)
    if closeness > MIN_CLOSENESS:
        return by_end(part, (0, atoms - 1)[end // nodes], end % nodes)
    link, closeness = _nearest_to_half(support.crossings)
    return by_link(part, *divmod(link, nodes)) if closeness > MIN_CLOSENESS else None


def _nearest_to_half(share: FloatArray) -> tuple[int, float]:
    """Flat index of the share nearest to a half, and its closeness: 0.5 at a half, 0 at 0 and 1."""
    closeness = (0.5 - abs(share - 0.5)).clip(min=0).ravel()
    at = int(closeness.argmax())
    return at, float(closeness[at])
