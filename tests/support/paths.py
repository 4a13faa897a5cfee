"""Random prices for the planner's pricing, and the cost of a given path at these prices."""

from __future__ import annotations

import numpy as np

from resplit.planner.bound.ng_paths import NgPaths
from resplit.planner.bound.paths import IntervalPaths, PathCosts


def random_costs(seed: int, atoms: int, nodes: int = 3) -> PathCosts:
    rng = np.random.default_rng(seed)
    return PathCosts(
        rng.uniform(0.1, 1, nodes), rng.random((atoms, nodes)), rng.random((nodes, nodes)) / 9, rng.random(nodes)
    )


def path_price(paths: IntervalPaths | NgPaths, costs: PathCosts, x: np.ndarray) -> float:
    """What the path `x` (A,) costs, computed from its definition."""
    ends = np.flatnonzero(np.diff(x)) + 1
    refund = costs.start_refund[x[0]] + sum(costs.link_refund[x[p - 1], x[p]] for p in ends)
    paid = costs.share @ paths.queue_paid(x) + costs.atom[np.arange(len(x)), x].sum()
    return float(paid + paths.instance.path_cost(x) - refund)
