"""Branch and bound over which nodes a placement uses, each part with prices of its own (see `dual`).

Mixtures of paths hide what single placements must choose; where a node is used by some of them only, those that use it
and those that do not are bounded apart.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from resplit.planner.budget import Budget
from resplit.planner.dual import Dual

__all__ = ["divide"]

LEAST_DIVIDED = 0.05  # a node that is entered so often, or nearly once, is not worth a division


def divide(root: Dual, price: Callable[[Dual], None], target: Callable[[], float], budget: Budget) -> float:
    """The bound that is proven by dividing what `root` bounds, again and again where the bound is lowest, until it
    reaches `target` or the budget is spent. `price` improves the bound of a part."""
    count, parts = 1, [(root.bound, 0, root)]
    while parts[0][0] < target() and not budget.spent:
        bound, number, part = heappop(parts)
        node = _most_divided(part)
        if node is None and not (part.converged and part.remember()):
            heappush(parts, (bound, number, part))
            break
        for each in [part] if node is None else part.divided(node):
            price(each)
            heappush(parts, (max(each.bound, bound), count, each))
            count += 1
    return parts[0][0]


def _most_divided(part: Dual) -> int | None:
    """The node that some of the mixture uses and some does not, most evenly; None where there is none."""
    entries = part.entries()
    evenness = (0.5 - abs(entries - 0.5)).clip(min=0)
    node = int(evenness.argmax())
    return node if evenness[node] > LEAST_DIVIDED else None
