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

__all__ = ["by_end", "by_link", "by_node", "divide"]

FEW_LABELS = 15_000  # of a pricing: up to that, remembering more costs little
MOST_NODES = 64  # beyond, whether one of them is used matters so little that remembering more always comes first
LEAST_EVENNESS = 0.05  # what hardly any or nearly all of a mixture does is not worth a division

Parts = tuple[Dual, Dual]


def divide(root: Dual, price: Callable[[Dual], None], target: Callable[[], float], budget: Budget) -> float:
    """The bound that is proven by dividing what `root` bounds, again and again where the bound is lowest, until it
    reaches `target` or the budget is spent. `price` improves the bound of a part, whose paths remember more as long as
    that costs little."""
    count, parts = 1, [(root.bound, 0, root)]
    while parts[0][0] < target() and not budget.spent:
        bound, number, part = heappop(parts)
        smaller = _smaller(part)
        if not smaller:
            heappush(parts, (bound, number, part))
            break
        for each in smaller:
            price(each)
            heappush(parts, (max(each.bound, bound), count, each))
            count += 1
    return parts[0][0]


def _smaller(part: Dual) -> Sequence[Dual]:
    """What is to be bounded instead of a part: itself with more in mind, where that costs little or nothing else is
    left, or its two halves. Empty where nothing is left to do."""
    cheap = part.labels < FEW_LABELS or part.instance.shape[1] > MOST_NODES
    if (cheap or part.overflowed) and part.converged and part.remember():
        return [part]
    if halves := _divided(part):
        return halves
    return [part] if part.converged and part.remember() else []


def by_node(part: Dual, node: int) -> Parts:
    """Placements that do not use a node, and that do."""
    barred = np.zeros_like(part.barred)
    barred[:, node] = True
    return part.restricted(barred), part.restricted(demanded=SetCuts.entry(barred.shape[1], node))


def by_end(part: Dual, atom: int, node: int) -> Parts:
    """Placements that do not have an atom, the first or the last, on a node, and that do."""
    without, others = np.zeros_like(part.barred), np.zeros_like(part.barred)
    without[atom, node] = True
    others[atom] = ~without[atom]
    return part.restricted(without), part.restricted(others)


def by_link(part: Dual, origin: int, node: int) -> Parts:
    """Placements that never go from one node to another, and that do."""
    closed = np.zeros_like(part.closed)
    closed[origin, node] = True
    return part.restricted(closed=closed), part.restricted(demanded=SetCuts.entry(len(closed), node, origin))


def _divided(part: Dual) -> Parts | None:
    """By what the mixture does most nearly half of the time: by a node; by an end where it agrees on which nodes are
    used, for that moves the bound less; by a link where it agrees on the ends too. None where it agrees on all."""
    if not part.mixture:
        return None
    atoms, nodes = part.instance.shape
    support = Support.mixed(part.resources, part.mixture)
    ends = np.zeros((2, nodes))  # how often the first and the last atom are on each node
    for weight, nodes_of in part.mixture:
        ends[[0, 1], nodes_of[[0, -1]]] += weight
    node, evenness = _most_even(support.begun + support.crossed.sum(axis=0))
    if evenness > LEAST_EVENNESS:
        return by_node(part, node)
    end, evenness = _most_even(ends)
    if evenness > LEAST_EVENNESS:
        return by_end(part, (0, atoms - 1)[end // nodes], end % nodes)
    link, evenness = _most_even(support.crossed)
    return by_link(part, *divmod(link, nodes)) if evenness > LEAST_EVENNESS else None


def _most_even(share: FloatArray) -> tuple[int, float]:
    """The place (in the flattened array) where a share is nearest to a half, and how near: 0.5 there, 0 at 0 and 1."""
    evenness = (0.5 - abs(share - 0.5)).clip(min=0).ravel()
    at = int(evenness.argmax())
    return at, float(evenness[at])
