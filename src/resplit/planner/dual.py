"""The Lagrangian bound: prices on what placements use of nodes, improved by column generation.

Every price vector gives a proven bound, whatever the tolerances of the linear program that suggested it: the cheapest
path at these prices is found exactly, the nodes' terms have a closed form (docs/planner.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.master import Master
from resplit.planner.paths import IntervalPaths, PathCosts
from resplit.planner.resources import Resources, SetCuts
from resplit.planner.tracked import TrackedPaths
from resplit.types import FloatArray

__all__ = ["Dual", "Prices"]

ROUNDING = 1e-9  # relative; taken off every bound
CONVERGED = 1e-5  # relative distance between the master's value and the bound
WHOLE_UNITS = 1  # the resource whose units are whole: memory rounded by the commonest atom
MOST_TRACKING_WORK = 4e7  # operations of one dynamic program over tracked nodes, about 0.2 s
SHARE_FLOOR = 1e-9  # the share of an interval's own queueing cost stays positive, so that inf stays inf


@dataclass(frozen=True)
class Prices:
    """Multipliers, all >= 0: `share` (N,) in (0, 1] of an interval's own queueing cost, `load` (N,) per unit of load,
    `resource` (K, N) per unit of a resource, `cut` (M,) of the set cuts, `balance` (N,) with a sum of at most beta."""

    share: FloatArray
    load: FloatArray
    resource: FloatArray
    cut: FloatArray
    balance: FloatArray

    def toward(self, other: Prices, step: float) -> Prices:
        """The point at `step` (0..1) of the way to `other`."""
        mine, theirs = vars(self), vars(other)
        return Prices(**{name: (1 - step) * mine[name] + step * theirs[name] for name in mine})


class Dual:
    """The best proven bound so far, the prices that give it and the columns found on the way."""

    def __init__(self, instance: Instance, paths: IntervalPaths, resources: Resources) -> None:
        self.instance = instance
        self.paths = paths
        self.resources = resources
        nodes = instance.shape[1]
        self.cuts = SetCuts.none(nodes)
        self._known_cuts: set[bytes] = set()
        self.prices = Prices(
            np.ones(nodes), np.zeros(nodes), np.zeros_like(resources.limit), np.zeros(0), np.zeros(nodes)
        )
        self.plain_prices = self.prices  # the best for `paths`, where no node is tracked
        self.bound = -np.inf
        self.converged = False
        self._master: Master | None = None
        self._inherited: list[IntArray] = []
        self._oracle: IntervalPaths | TrackedPaths = paths
        self._tried: set[frozenset[int]] = set()
        self._step = 0.5
        self._stalls, self._bound_before_cuts = 0, -np.inf

    def adopt(self, other: Dual) -> None:
        """Begins from the cuts, prices and columns of another state of the same blocks and nodes."""
        if other.resources.limit.shape != self.resources.limit.shape or other.instance.shape != self.instance.shape:
            return
        limits = (other.cuts.members * self.resources.limit[other.cuts.resource]).sum(axis=1)
        self.cuts = SetCuts(other.cuts.members, other.cuts.resource, limits)
        self._known_cuts = set(other._known_cuts)
        self._inherited = other._master.active() if other._master is not None else []
        self.evaluate(other.plain_prices)

    def evaluate(self, prices: Prices) -> tuple[float, IntArray]:
        """The Lagrangian at `prices`, a lower bound on every placement's objective, and the path that attains it; the
        best is kept. (inf, ()) where no path exists at all, at any prices."""
        prices = self._legal(prices)
        path_cost, nodes_of = self._oracle.shortest(self.path_costs(prices))
        if not len(nodes_of):
            self.bound = float("inf")
            return self.bound, nodes_of
        value = path_cost + self.rest(prices)
        if value > self.bound:
            self.bound = value
            self.prices = prices
            if self._oracle is self.paths:
                self.plain_prices = prices
        return value, nodes_of

    def path_costs(self, prices: Prices) -> PathCosts:
        """What a path pays at `prices`."""
        finite = np.where(np.isfinite(self.instance.load), self.instance.load, 0)
        resource = prices.resource + self.cuts.atom_price(prices.cut, len(self.resources.use))
        on_link, at_start = self.cuts.entry_refund(prices.cut)
        return PathCosts(prices.share, finite * prices.load + self.resources.use.T @ resource, on_link, at_start)

    def rest(self, prices: Prices) -> float:
        """What the Lagrangian adds to the cost of the path: node terms, peak and limits, less their rounding."""
        instance = self.instance
        spare = instance.balance_weight - prices.balance.sum()
        gains = (
            _node_terms(instance, 1 - prices.share, prices.load - prices.balance).sum()
            + prices.balance @ instance.background
            + spare * instance.background.max()
        )
        paid = (prices.resource * self.resources.limit).sum()
        refunded = (prices.cut * self.cuts.limit).sum()
        return float(gains - paid - ROUNDING * (abs(gains) + paid + refunded))

    def improve(self, columns: list[IntArray], budget: Budget, target: float, most: int = 1_000_000) -> list[IntArray]:
        """Column generation with `columns` until the bound reaches `target`, `most` paths were priced, nothing improves
        (then `converged` is set) or the budget is spent. Returns the paths that were priced; they may break limits."""
        if self._master is None:
            first = self.evaluate(self.prices)[1]
            if not len(first):
                return []
            columns = [first, *self._inherited, *columns]
            scale = (abs(target) if np.isfinite(target) else abs(self.bound)) or 1.0
            self._master = Master(self.instance, self._oracle, self.resources, self.cuts, scale)
        master = self._master
        for nodes_of in columns:
            self.converged &= not master.add(nodes_of)
        found: list[IntArray] = []
        while self.bound < target and len(found) < most and not self.converged and budget.spend():
            value, duals = master.solve()
            prices = Prices(*duals)
            if value - self.bound <= CONVERGED * abs(value):
                self.converged = not self._worth_cutting(value) or not self._cut(master)
                continue
            before = self.bound
            _, nodes_of = self.evaluate(self.prices.toward(prices, self._step))
            improved = self.bound > before
            self._step = min(1.0, self._step * 1.2) if improved else max(0.2, self._step * 0.9)
            found.append(nodes_of)
            if not master.add(nodes_of) and not improved:
                _, nodes_of = self.evaluate(prices)
                found.append(nodes_of)
                self.converged = not master.add(nodes_of) and not self._cut(master)
        return found

    def _worth_cutting(self, value: float) -> bool:
        """False where the last rounds of set cuts have hardly raised the bound."""
        self._stalls = self._stalls + 1 if self.bound - self._bound_before_cuts < 1e-3 * abs(value) else 0
        self._bound_before_cuts = self.bound
        return self._stalls <= 3

    def track(self) -> bool:
        """From now on paths keep the limit of one more node, the one that the mixture's paths misuse most; where the
        states would be too many, those tracked longest are let go. False where that leads nowhere new."""
        if self._master is None or len(self.resources.use) < 2:
            return False
        tracked = self._oracle.nodes if isinstance(self._oracle, TrackedPaths) else []
        use, limit = self.resources.use[WHOLE_UNITS], self.resources.limit[WHOLE_UNITS]
        abuse = self._master.abuse(WHOLE_UNITS)
        abuse[tracked] = 0
        nodes = [*tracked, int(abuse.argmax())]
        atoms, n = self.instance.shape
        while nodes and np.prod(limit[nodes] + 1) * atoms * n * (atoms / 2 + n) > MOST_TRACKING_WORK:
            nodes.pop(0)
        if abuse.max() <= 1e-6 or not nodes or frozenset(nodes) in self._tried:
            return False
        self._tried.add(frozenset(nodes))
        self._oracle = TrackedPaths(self.paths, use, nodes, [int(limit[i]) for i in nodes])
        self._inherited = [x for x in self._master.columns if all(use[x == i].sum() <= limit[i] for i in nodes)]
        self._master, self.converged, self._stalls = None, False, 0
        return True

    def _cut(self, master: Master) -> bool:
        """Adds the set cuts that the master's mixture breaks; False where it breaks none."""
        support = master.support()
        new = SetCuts.violated(self.resources, support, self._known_cuts)
        if not len(new):
            return False
        self.cuts = self.cuts.joined(new)
        self.prices = _padded(self.prices, len(new))
        self.plain_prices = _padded(self.plain_prices, len(new))
        master.add_cuts(new)
        return True

    def _legal(self, prices: Prices) -> Prices:
        """The nearest multipliers with the right signs and sums."""
        balance = np.maximum(prices.balance, 0)
        return Prices(
            share=np.clip(prices.share, SHARE_FLOOR, 1),
            load=np.maximum(prices.load, 0),
            resource=np.maximum(prices.resource, 0),
            cut=np.maximum(prices.cut, 0),
            balance=balance * min(1.0, self.instance.balance_weight / max(float(balance.sum()), 1e-300)),
        )


def _padded(prices: Prices, cuts: int) -> Prices:
    """`prices` with 0 for so many new cuts."""
    return replace(prices, cut=np.concatenate((prices.cut, np.zeros(cuts))))


def _node_terms(instance: Instance, weight: FloatArray, price: FloatArray) -> FloatArray:
    """min over 0 <= l <= headroom of weight x queue_cost(l) - price x l, in closed form (N,)."""
    free = 1 - instance.background
    top = np.clip(instance.headroom, 0, None)
    with np.errstate(over="ignore"):  # a price next to 0 means: no load
        ratio = np.divide(weight * instance.queue_weight * free, price, out=np.full_like(free, np.inf), where=price > 0)
    load = np.clip(free - np.sqrt(ratio), 0, top)
    terms: FloatArray = weight * instance.queue_cost(load) - price * load
    return terms
