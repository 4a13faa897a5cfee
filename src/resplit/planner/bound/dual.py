"""The Lagrangian bound: prices on what placements use of nodes, improved by column generation.

Every price vector gives a proven bound, whatever the tolerances of the linear program that suggested it: the cheapest
path at these prices is found exactly, the nodes' terms have a closed form (docs/planner.md).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from resplit.planner.bound.master import Master
from resplit.planner.bound.ng_growth import Curriculum
from resplit.planner.bound.ng_paths import Memory, NgPaths, detours
from resplit.planner.bound.node_states import Contents
from resplit.planner.bound.paths import IntervalPaths, PathCosts
from resplit.planner.bound.resources import Resources, SetCuts, Support
from resplit.planner.budget import ENDLESS, Budget
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["Dual", "Prices"]

ROUNDING = 1e-9  # relative; taken off every bound
CONVERGED = 1e-5  # relative distance between the master's value and the bound
ENOUGH = 0.02  # of what is left to the target: closer than that, remembering more is worth more than better prices
# How far above the bound paths that remember are looked for, as a share of the way to the target.
FIRST_REACH, LEAST_REACH, MOST_REACH = 1 / 8, 1 / 100, 1 / 2
BLIND_REACH = 0.1  # relative to the bound; the way to go where no target is known
FEW = 1 / 10  # of the labels that one pricing may take
LABELS_PER_STEP = 10_000
WORTH_CUTTING, MOST_STALLS = 4e-3, 1
MOST_INHERITED = 300  # columns
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
        self.closed = np.zeros((nodes, nodes), dtype=bool)  # links that placements here do not cross
        self.barred = np.zeros(instance.shape, dtype=bool)  # where they do not have an atom
        self._known_cuts: set[bytes] = set()
        self.prices = Prices(
            np.ones(nodes), np.zeros(nodes), np.zeros_like(resources.limit), np.zeros(0), np.zeros(nodes)
        )
        self.plain_prices = self.prices  # the best for `paths`, which remember nothing
        self.bound = -np.inf
        self.converged = False
        self._master: Master | None = None
        self._inherited: list[IntArray] = []
        self._oracle: IntervalPaths | NgPaths = paths
        self._levels: dict[bool, Contents] = {}  # coarse or not; made once something is to be remembered
        self._curriculum: Curriculum | None = None
        self._reach = FIRST_REACH
        self._most = _most_cost(instance)
        self._step = 0.5
        self._stalls, self._bound_before_cuts = 0, -np.inf

    def adopt(self, other: Dual) -> None:
        """Begins from the cuts, prices and columns of another state of the same blocks and nodes."""
        if other.resources.limit.shape != self.resources.limit.shape or other.instance.shape != self.instance.shape:
            return
        self.cuts = other.cuts.renewed(self.resources)
        self.prices, self.plain_prices = (_padded(p, len(self.cuts)) for p in (self.prices, self.plain_prices))
        self._known_cuts = set(other._known_cuts)
        self._inherited = [nodes_of for _, nodes_of in other.mixture]
        self.evaluate(other.plain_prices)

    def evaluate(self, prices: Prices, cutoff: float = np.inf, budget: Budget = ENDLESS) -> tuple[float, IntArray]:
        """The Lagrangian at `prices`, a lower bound on every placement's objective, and the path that attains it; the
        best is kept. Paths that remember are looked for below `cutoff` only: else (cutoff, ()), or (-inf, ()) where
        that takes too many labels, or longer than `budget`. (inf, ()) where no path exists at all, at any prices, or
        where the bound is above anything that a placement can cost."""
        prices = self._legal(prices)
        rest, costs = self.rest(prices), self.path_costs(prices)
        if isinstance(self._oracle, NgPaths):
            path_cost, nodes_of = self._oracle.shortest(costs, cutoff - rest, budget)
        else:
            path_cost, nodes_of = self._oracle.shortest(costs)
        value = path_cost + rest
        if value > self.bound:
            self.bound = value
            self.prices = prices
            if self._oracle is self.paths:
                self.plain_prices = prices
        if self.bound > self._most:
            self.bound = float("inf")
            return self.bound, np.empty(0, dtype=np.intp)
        return value, nodes_of

    def path_costs(self, prices: Prices) -> PathCosts:
        """What a path pays at `prices`."""
        finite = np.where(np.isfinite(self.instance.load), self.instance.load, 0)
        resource = prices.resource + self.cuts.atom_price(prices.cut, len(self.resources.use))
        on_link, at_start = self.cuts.entry_refund(prices.cut)
        on_link[self.closed] = -np.inf
        return PathCosts(prices.share, finite * prices.load + self.resources.use.T @ resource, on_link, at_start)

    def rest(self, prices: Prices) -> float:
        """What the Lagrangian adds to the cost of the path: node terms, peak and limits, less their rounding."""
        instance = self.instance
        spare = instance.balance_weight - prices.balance.sum()
        gains = (
            _node_terms(instance, 1 - prices.share, prices.load - prices.balance).sum()
            + prices.balance @ instance.background
            + spare * instance.background.max()
            + prices.cut @ self.cuts.least
        )
        paid = (prices.resource * self.resources.limit).sum()
        refunded = (prices.cut * self.cuts.limit).sum()
        return float(gains - paid - ROUNDING * (abs(gains) + paid + refunded))

    def improve(self, columns: list[IntArray], budget: Budget, target: float, most: int = 1_000_000) -> list[IntArray]:
        """Column generation with `columns` until the bound reaches `target`, `most` paths were priced, nothing improves
        (then `converged` is set) or the budget is spent. Returns the paths that were priced; they may break limits."""
        if budget.spent:  # a master of many columns takes long to set up
            return []
        if self._master is None:
            if self._oracle is self.paths:
                columns = [self.evaluate(self.prices)[1], *columns]
            if self.bound == np.inf:
                return []
            columns = [*self._inherited, *columns]
            scale = (abs(target) if np.isfinite(target) else abs(self.bound)) or 1.0
            self._master = Master(self.instance, self._oracle, self.resources, self.cuts, scale)
        master = self._master
        for nodes_of in columns:
            self.converged &= not (self._allows(nodes_of) and master.add(nodes_of))
        found: list[IntArray] = []
        priced = 0
        while self.bound < target and priced < most and not self.converged and self._spend(budget):
            prices = Prices(*master.solve()) if len(master.columns) else self.prices
            value = master.value
            if value - self.bound <= max(CONVERGED * abs(value), self._enough(target)):
                self.converged = not self._worth_cutting(value) or not self._cut(master)
                continue
            priced += 1
            new = self._price(master, self.prices.toward(prices, self._step), target, found, budget)
            if not new and not self.converged:
                new = self._price(master, prices, target, found, budget)
                self.converged |= not new and not self._cut(master)
        return found

    def _price(self, master: Master, prices: Prices, target: float, found: list[IntArray], budget: Budget) -> bool:
        """Prices one path; True where that brought a new column or a better bound."""
        before, value, cutoff = self.bound, master.value, target
        if isinstance(self._oracle, NgPaths):
            way = target - before if np.isfinite(target) else BLIND_REACH * abs(before)
            cutoff = min(target, value + CONVERGED * abs(value), before + self._reach * way)
        _, nodes_of = self.evaluate(prices, cutoff, budget)
        improved = self.bound > before
        self._step = min(1.0, self._step * 1.2) if improved else max(0.2, self._step * 0.9)
        if not len(nodes_of):
            self._adapt_reach()
            self.converged = self._reach < LEAST_REACH or self.bound == np.inf
            return True
        found.append(nodes_of)
        return bool(master.add(nodes_of)) or improved

    def _adapt_reach(self) -> None:
        """Nothing was found within reach, or too much to see all of it."""
        if isinstance(self._oracle, NgPaths) and self._oracle.overflowed:
            self._reach /= 4
        elif isinstance(self._oracle, NgPaths) and self._oracle.labels < FEW * self._oracle.most_labels:
            self._reach = min(2 * self._reach, MOST_REACH)

    def _enough(self, target: float) -> float:
        """How near to its master's value the bound of paths that remember has to come."""
        if not np.isfinite(target):
            return 0.0
        return ENOUGH * (target - self.bound)

    def _spend(self, budget: Budget) -> bool:
        return budget.spend(1 + (self._oracle.labels // LABELS_PER_STEP if isinstance(self._oracle, NgPaths) else 0))

    def _worth_cutting(self, value: float) -> bool:
        """False where the last rounds of set cuts have hardly raised the bound."""
        self._stalls = self._stalls + 1 if self.bound - self._bound_before_cuts < WORTH_CUTTING * abs(value) else 0
        self._bound_before_cuts = self.bound
        return self._stalls <= MOST_STALLS

    def remember(self) -> bool:
        """From now on paths remember more: the worst detours that the mixture takes, or fewer of them than last time
        where that took too many labels. False where nothing new is left to remember."""
        if self._master is None:
            return False
        if self._curriculum is None:
            exact = Contents.of(self.instance)
            coarse = exact.coarse(self.instance)
            self._levels = {False: exact, True: coarse}
            fewer = 2 * len(coarse.memory) < len(exact.memory)
            self._curriculum = Curriculum(Memory.of(self.instance.shape[1], fewer))
        plan = self._curriculum
        if self.overflowed:
            more = plan.retreat()
        else:
            few = not isinstance(self._oracle, NgPaths) or self._oracle.labels < FEW**2 * self._oracle.most_labels
            found = detours(self.instance, self.mixture, plan.memory, self._master.value)
            more = plan.learn(found, few)
        if not more:
            return False
        self._oracle = self._remembering(plan.memory, plan.most_labels)
        self._begin_anew()
        return True

    def _remembering(self, memory: Memory, most_labels: int) -> NgPaths:
        return NgPaths(self.paths, self._levels[memory.coarse], memory, most_labels)

    def _begin_anew(self) -> None:
        """A new master for the next pricing, from the columns of this one."""
        if self._master is not None:
            last = [nodes_of for _, nodes_of in self.mixture]
            columns = {x.tobytes(): x for x in [*self._inherited, *self._master.columns, *last]}
            self._inherited = [x for x in columns.values() if self._allows(x)][-MOST_INHERITED:]
        self._master, self.converged, self._stalls, self._reach = None, False, 0, FIRST_REACH

    @property
    def labels(self) -> int:
        """What the last pricing took, 0 while paths remember nothing."""
        return self._oracle.labels if isinstance(self._oracle, NgPaths) else 0

    @property
    def overflowed(self) -> bool:
        """Whether paths remember more than can be priced."""
        return isinstance(self._oracle, NgPaths) and self._reach < LEAST_REACH

    @property
    def mixture(self) -> list[tuple[float, IntArray]]:
        """The placements, with their weights, that the last prices were found for."""
        return self._master.mixture() if self._master is not None else []

    def restricted(
        self, barred: NDArray[np.bool_] | None = None, closed: NDArray[np.bool_] | None = None,
        demanded: SetCuts | None = None,
    ) -> Dual:  # fmt: skip
        """The same for only those placements that have no atom where it is `barred` (A, N) from, cross no link that is
        `closed` (N, N) and do what is `demanded`; it goes on from what is known here."""
        part = copy(self)
        part._known_cuts, part._curriculum = set(self._known_cuts), self._curriculum and self._curriculum.afresh()
        if barred is not None:
            part.barred = self.barred | barred
            part.paths = part._oracle = self.paths.barring(barred)
            if isinstance(self._oracle, NgPaths):
                part._oracle = part._remembering(self._oracle.memory, self._oracle.most_labels)
        if closed is not None:
            part.closed = self.closed | closed
        if demanded is not None:
            part.cuts = self.cuts.joined(demanded)
            part.prices, part.plain_prices = (_padded(p, len(demanded)) for p in (self.prices, self.plain_prices))
        part._begin_anew()
        return part

    def _allows(self, nodes_of: IntArray) -> bool:
        """Whether a placement has no atom and crosses no link that is out of bounds here."""
        barred = self.barred[np.arange(len(nodes_of)), nodes_of].any()
        return not (barred or self.closed[nodes_of[:-1], nodes_of[1:]].any())

    def _cut(self, master: Master) -> bool:
        """Adds the set cuts that the master's mixture breaks; False where it breaks none."""
        if not self.mixture:  # no column has any weight: all is taken up by elastic slacks
            return False
        support = Support.mixed(self.resources, self.mixture)
        new = SetCuts.violated(self.resources, support, self._known_cuts)
        new = new.joined(SetCuts.uncovered(self.resources, support, self._known_cuts, np.all(self.barred, axis=0)))
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


def _most_cost(instance: Instance) -> float:
    """A bound from above on the objective of every placement."""
    finite = [np.where(np.isfinite(part), part, 0).max() for part in (instance.start, instance.end, *instance.hops)]
    queue = instance.queue_cost(np.clip(instance.headroom, 0, None)).sum()
    return float(queue + instance.fixed.max(axis=1).sum() + instance.shape[0] * sum(finite) + instance.balance_weight)
