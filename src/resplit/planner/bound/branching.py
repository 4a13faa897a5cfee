"""Branch and bound over what mixtures of paths leave open: which nodes are used, where the chain's ends are, and from
which node it goes to which. Each part of the placements has prices of its own (see `dual`).
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

FEW_LABELS = 15_000  # of a pricing: up to that, remembering more costs little
MAX_NODES = 64  # beyond, whether one of them is used matters so little that remembering more always comes first
MIN_CLOSENESS = 0.05  # what hardly any or nearly all of a mixture does is not worth a division

Parts = tuple[Dual, Dual]


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
    """What is to be bounded instead of a part: itself with more in mind, where that costs little or nothing else is
    left, or its two halves. Empty where nothing is left to do."""
    cheap = part.labels < FEW_LABELS or part.instance.shape[1] > MAX_NODES
    if (cheap or part.overflowed) and part.converged and part.grow_neighbourhoods():
        return [part]
    if halves := _split(part):
        return halves
    return [part] if part.converged and part.grow_neighbourhoods() else []


def by_node(part: Dual, node: int) -> Parts:
    """Placements that do not use a node, and that do."""
    forbidden = np.zeros_like(part.forbidden)
    forbidden[:, node] = True
    return part.subproblem(forbidden), part.subproblem(required=SetCuts.entry(forbidden.shape[1], node))


def by_end(part: Dual, atom: int, node: int) -> Parts:
    """Placements that do not have an atom, the first or the last, on a node, and that do."""
    without, others = np.zeros_like(part.forbidden), np.zeros_like(part.forbidden)
    without[atom, node] = True
    others[atom] = ~without[atom]
    return part.subproblem(without), part.subproblem(others)


def by_link(part: Dual, origin: int, node: int) -> Parts:
    """Placements that never go from one node to another, and that do."""
    forbidden_links = np.zeros_like(part.forbidden_links)
    forbidden_links[origin, node] = True
    return part.subproblem(forbidden_links=forbidden_links), part.subproblem(
        required=SetCuts.entry(len(forbidden_links), node, origin)
    )


def _split(part: Dual) -> Parts | None:
    """By what the mixture does most nearly half of the time: by a node; by an end where it agrees on which nodes are
    used, for that moves the bound less; by a link where it agrees on the ends too. None where it agrees on all."""
    if not part.solution:
        return None
    atoms, nodes = part.instance.shape
    support = Support.of_solution(part.resources, part.solution)
    ends = np.zeros((2, nodes))  # how often the first and the last atom are on each node
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
    """The place (in the flattened array) where a share is nearest to a half, and how near: 0.5 there, 0 at 0 and 1."""
    closeness = (0.5 - abs(share - 0.5)).clip(min=0).ravel()
    at = int(closeness.argmax())
    return at, float(closeness[at])
