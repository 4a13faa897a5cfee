"""The Lagrangian bound: dual prices on the use of nodes, improved by column generation.

Every price vector gives a proven bound, because the cheapest path is found exactly and the nodes' terms have a closed
form (docs/planner.md). The tolerances of the linear program that suggests the prices do not matter.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from resplit.planner.bound.master import RestrictedMaster
from resplit.planner.bound.ng_growth import NeighbourhoodGrowth
from resplit.planner.bound.ng_paths import Neighbourhoods, NgPaths, find_cycles
from resplit.planner.bound.node_states import NodeStates
from resplit.planner.bound.paths import IntervalPaths, PathCosts
from resplit.planner.bound.resources import Resources, SetCuts, Support
from resplit.planner.budget import UNLIMITED, Budget
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["Dual", "Prices"]

ROUNDING = 1e-9  # relative; subtracted from every bound
CONVERGED = 1e-5  # relative distance between the master's value and the bound
SOUGHT_GAP_SHARE = 0.02  # of the distance to the target; below, larger neighbourhoods gain more than better prices
# How far above the bound the cutoff of ng-route pricing lies, as a share of the distance to the target.
FIRST_REACH, MIN_REACH, MAX_REACH = 1 / 8, 1 / 100, 1 / 2
REACH_WITHOUT_TARGET = 0.1  # relative to the bound; replaces the distance if there is no target
FEW_LABELS_SHARE = 1 / 10  # of the labels that one pricing may take
LABELS_PER_STEP = 10_000
MIN_CUT_GAIN, MAX_STALLS = 4e-3, 1  # relative gain of a round of set cuts; consecutive rounds that gain less
MAX_INITIAL_COLUMNS = 300  # of a new master
SHARE_FLOOR = 1e-9  # keeps the share of the queueing cost positive, so that infinite costs stay infinite


@dataclass(frozen=True)
class Prices:
    """Lagrangian multipliers, all >= 0.

    - `share` (N,): of the queueing cost of each interval alone; in (0, 1].
    - `load` (N,): per unit of load. `resource` (K, N): per unit of each resource.
    - `cut` (M,): of the set cuts.
    - `balance` (N,): of the rows of the peak; their sum is at most beta.
    """

    share: FloatArray
    load: FloatArray
    resource: FloatArray
    cut: FloatArray
    balance: FloatArray

    def toward(self, other: Prices, step: float) -> Prices:
        """The convex combination (1 - step) self + step other."""
        mine, theirs = vars(self), vars(other)
        return Prices(**{name: (1 - step) * mine[name] + step * theirs[name] for name in mine})


class Dual:
    """The best proven bound so far, the prices that give it, and the state of column generation."""

    def __init__(self, instance: Instance, paths: IntervalPaths, resources: Resources) -> None:
        self.instance = instance
        self.paths = paths
        self.resources = resources
        nodes = instance.shape[1]
        self.cuts = SetCuts.empty(nodes)
        self.forbidden_links = np.zeros((nodes, nodes), dtype=bool)  # links not used in this subproblem
        self.forbidden = np.zeros(instance.shape, dtype=bool)  # pairs of atom and node not used in it
        self._known_cuts: set[bytes] = set()
        self.prices = Prices(
            np.ones(nodes), np.zeros(nodes), np.zeros_like(resources.limit), np.zeros(0), np.zeros(nodes)
        )
        self.plain_prices = self.prices  # the best for `paths`, which have no neighbourhoods
        self.bound = -np.inf
        self.converged = False
        self._master: RestrictedMaster | None = None
        self._initial_columns: list[IntArray] = []
        self._pricer: IntervalPaths | NgPaths = paths
        self._states: dict[bool, NodeStates] = {}  # coarse or not; made once neighbourhoods grow
        self._growth: NeighbourhoodGrowth | None = None
        self._reach = FIRST_REACH
        self._max_objective = _max_objective_of(instance)
        self._step = 0.5
        self._stalls, self._bound_before_cuts = 0, -np.inf

    def warm_start(self, other: Dual) -> None:
        """Start from the cuts, prices and columns of `other`, a dual of a problem with the same blocks and nodes."""
        if other.resources.limit.shape != self.resources.limit.shape or other.instance.shape != self.instance.shape:
            return
        self.cuts = other.cuts.with_limits_of(self.resources)
        self.prices, self.plain_prices = (_padded(p, len(self.cuts)) for p in (self.prices, self.plain_prices))
        self._known_cuts = set(other._known_cuts)
        self._initial_columns = [nodes_of for _, nodes_of in other.solution]
        self.evaluate(other.plain_prices)

    def evaluate(self, prices: Prices, cutoff: float = np.inf, budget: Budget = UNLIMITED) -> tuple[float, IntArray]:
        """The Lagrangian at `prices`, a lower bound on every placement's objective, and the path (A,) that attains it.

        The best bound is kept. ng-route paths are sought below `cutoff` only: the result is (cutoff, ()) if there is
        none, and (-inf, ()) if the search exceeds the label limit or `budget`. The result is (inf, ()) if no path
        exists at any prices, or if the bound exceeds the cost of every possible placement.
        """
        prices = self._projected(prices)
        constant_terms, costs = self.constant_terms(prices), self.path_costs(prices)
        if isinstance(self._pricer, NgPaths):
            path_cost, nodes_of = self._pricer.shortest(costs, cutoff - constant_terms, budget)
        else:
            path_cost, nodes_of = self._pricer.shortest(costs)
        value = path_cost + constant_terms
        if value > self.bound:
            self.bound = value
            self.prices = prices
            if self._pricer is self.paths:
                self.plain_prices = prices
        if self.bound > self._max_objective:
            self.bound = float("inf")
            return self.bound, np.empty(0, dtype=np.intp)
        return value, nodes_of

    def path_costs(self, prices: Prices) -> PathCosts:
        """The costs of paths at `prices`."""
        finite = np.where(np.isfinite(self.instance.load), self.instance.load, 0)
        resource = prices.resource + self.cuts.atom_price(prices.cut, len(self.resources.use))
        on_link, at_start = self.cuts.entry_refund(prices.cut)
        on_link[self.forbidden_links] = -np.inf
        return PathCosts(prices.share, finite * prices.load + self.resources.use.T @ resource, on_link, at_start)

    def constant_terms(self, prices: Prices) -> float:
        """The terms of the Lagrangian that do not depend on the path, less an allowance for rounding."""
        instance = self.instance
        spare = instance.balance_weight - prices.balance.sum()
        gains = (
            _node_terms(instance, 1 - prices.share, prices.load - prices.balance).sum()
            + prices.balance @ instance.background
            + spare * instance.background.max()
            + prices.cut @ self.cuts.constant_use
        )
        paid = (prices.resource * self.resources.limit).sum()
        refunded = (prices.cut * self.cuts.limit).sum()
        return float(gains - paid - ROUNDING * (abs(gains) + paid + refunded))

    def generate_columns(
        self, columns: list[IntArray], budget: Budget, target: float, max_paths: int = 1_000_000
    ) -> list[IntArray]:
        """Generate columns, starting with `columns`, and return the priced paths, which may violate limits.

        It stops when the bound reaches `target`, after `max_paths` paths, at convergence (then `converged` is set), or
        when the budget is spent.
        """
        if budget.spent:  # setting up a master with many columns takes long
            return []
        if self._master is None:
            if self._pricer is self.paths:
                columns = [self.evaluate(self.prices)[1], *columns]
            if self.bound == np.inf:
                return []
            columns = [*self._initial_columns, *columns]
            scale = (abs(target) if np.isfinite(target) else abs(self.bound)) or 1.0
            self._master = RestrictedMaster(self.instance, self._pricer, self.resources, self.cuts, scale)
        master = self._master
        for nodes_of in columns:
            self.converged &= not (self._allows(nodes_of) and master.add(nodes_of))
        found: list[IntArray] = []
        priced = 0
        while self.bound < target and priced < max_paths and not self.converged and self._spend(budget):
            prices = Prices(*master.solve()) if len(master.columns) else self.prices
            value = master.value
            if value - self.bound <= max(CONVERGED * abs(value), self._gap_sought(target)):
                self.converged = not self._cuts_help(value) or not self._add_cuts(master)
                continue
            priced += 1
            new = self._price(master, self.prices.toward(prices, self._step), target, found, budget)
            if not new and not self.converged:
                new = self._price(master, prices, target, found, budget)
                self.converged |= not new and not self._add_cuts(master)
        return found

    def _price(
        self, master: RestrictedMaster, prices: Prices, target: float, found: list[IntArray], budget: Budget
    ) -> bool:
        """Price one path. Returns True if that gave a new column or a better bound."""
        before, value, cutoff = self.bound, master.value, target
        if isinstance(self._pricer, NgPaths):
            distance = target - before if np.isfinite(target) else REACH_WITHOUT_TARGET * abs(before)
            cutoff = min(target, value + CONVERGED * abs(value), before + self._reach * distance)
        _, nodes_of = self.evaluate(prices, cutoff, budget)
        improved = self.bound > before
        self._step = min(1.0, self._step * 1.2) if improved else max(0.2, self._step * 0.9)
        if not len(nodes_of):
            self._adapt_reach()
            self.converged = self._reach < MIN_REACH or self.bound == np.inf
            return True
        found.append(nodes_of)
        return bool(master.add(nodes_of)) or improved

    def _adapt_reach(self) -> None:
        """Lower the cutoff if pricing exceeded the label limit; raise it if it took few labels and found no path."""
        if isinstance(self._pricer, NgPaths) and self._pricer.overflowed:
            self._reach /= 4
        elif isinstance(self._pricer, NgPaths) and self._pricer.labels < FEW_LABELS_SHARE * self._pricer.max_labels:
            self._reach = min(2 * self._reach, MAX_REACH)

    def _gap_sought(self, target: float) -> float:
        """The gap between the master's value and the bound below which column generation ends."""
        if not np.isfinite(target):
            return 0.0
        return SOUGHT_GAP_SHARE * (target - self.bound)

    def _spend(self, budget: Budget) -> bool:
        return budget.spend(1 + (self._pricer.labels // LABELS_PER_STEP if isinstance(self._pricer, NgPaths) else 0))

    def _cuts_help(self, value: float) -> bool:
        """False if the last rounds of set cuts have hardly raised the bound."""
        self._stalls = self._stalls + 1 if self.bound - self._bound_before_cuts < MIN_CUT_GAIN * abs(value) else 0
        self._bound_before_cuts = self.bound
        return self._stalls <= MAX_STALLS

    def grow_neighbourhoods(self) -> bool:
        """Grow the ng-neighbourhoods so that they exclude cycles in the master's solution.

        If the last growth needed too many labels, it is replaced by a smaller one. Returns False if no growth is left.
        """
        if self._master is None:
            return False
        if self._growth is None:
            exact = NodeStates.of(self.instance)
            coarse = exact.coarse(self.instance)
            self._states = {False: exact, True: coarse}
            fewer = 2 * len(coarse.memory) < len(exact.memory)
            self._growth = NeighbourhoodGrowth(Neighbourhoods.of(self.instance.shape[1], fewer))
        growth = self._growth
        if self.overflowed:
            more = growth.reduce()
        else:
            few_labels = (
                not isinstance(self._pricer, NgPaths)
                or self._pricer.labels < FEW_LABELS_SHARE**2 * self._pricer.max_labels
            )
            found = find_cycles(self.instance, self.solution, growth.neighbourhoods, self._master.value)
            more = growth.extend(found, few_labels)
        if not more:
            return False
        self._pricer = self._ng_paths(growth.neighbourhoods, growth.max_labels)
        self._reset_master()
        return True

    def _ng_paths(self, neighbourhoods: Neighbourhoods, max_labels: int) -> NgPaths:
        return NgPaths(self.paths, self._states[neighbourhoods.coarse], neighbourhoods, max_labels)

    def _reset_master(self) -> None:
        """Drop the master; the next one starts from its columns."""
        if self._master is not None:
            last = [nodes_of for _, nodes_of in self.solution]
            columns = {x.tobytes(): x for x in [*self._initial_columns, *self._master.columns, *last]}
            self._initial_columns = [x for x in columns.values() if self._allows(x)][-MAX_INITIAL_COLUMNS:]
        self._master, self.converged, self._stalls, self._reach = None, False, 0, FIRST_REACH

    @property
    def labels(self) -> int:
        """Labels of the last pricing; 0 while there are no neighbourhoods."""
        return self._pricer.labels if isinstance(self._pricer, NgPaths) else 0

    @property
    def overflowed(self) -> bool:
        """Whether pricing exceeds the label limit at every useful cutoff."""
        return isinstance(self._pricer, NgPaths) and self._reach < MIN_REACH

    @property
    def solution(self) -> list[tuple[float, IntArray]]:
        """The solution of the restricted master: paths with their weights, which sum to 1."""
        return self._master.solution() if self._master is not None else []

    def subproblem(
        self, forbidden: NDArray[np.bool_] | None = None, forbidden_links: NDArray[np.bool_] | None = None,
        required: SetCuts | None = None,
    ) -> Dual:  # fmt: skip
        """The subproblem of the placements that avoid the `forbidden` (A, N) pairs of atom and node and the
        `forbidden_links` (N, N), and satisfy the cuts in `required`. It starts from these prices and columns."""
        part = copy(self)
        part._known_cuts, part._growth = set(self._known_cuts), self._growth and self._growth.restarted()
        if forbidden is not None:
            part.forbidden = self.forbidden | forbidden
            part.paths = part._pricer = self.paths.without(forbidden)
            if isinstance(self._pricer, NgPaths):
                part._pricer = part._ng_paths(self._pricer.neighbourhoods, self._pricer.max_labels)
        if forbidden_links is not None:
            part.forbidden_links = self.forbidden_links | forbidden_links
        if required is not None:
            part.cuts = self.cuts.joined(required)
            part.prices, part.plain_prices = (_padded(p, len(required)) for p in (self.prices, self.plain_prices))
        part._reset_master()
        return part

    def _allows(self, nodes_of: IntArray) -> bool:
        """Whether a placement belongs to this subproblem, required cuts aside."""
        forbidden = self.forbidden[np.arange(len(nodes_of)), nodes_of].any()
        return not (forbidden or self.forbidden_links[nodes_of[:-1], nodes_of[1:]].any())

    def _add_cuts(self, master: RestrictedMaster) -> bool:
        """Add set cuts that the master's solution violates. Returns False if there is none."""
        if not self.solution:  # the elastic slacks cover all rows, and no column has a weight
            return False
        support = Support.of_solution(self.resources, self.solution)
        new = SetCuts.violated_use_cuts(self.resources, support, self._known_cuts)
        new = new.joined(
            SetCuts.violated_entry_cuts(self.resources, support, self._known_cuts, np.all(self.forbidden, axis=0))
        )
        if not len(new):
            return False
        self.cuts = self.cuts.joined(new)
        self.prices = _padded(self.prices, len(new))
        self.plain_prices = _padded(self.plain_prices, len(new))
        master.add_cuts(new)
        return True

    def _projected(self, prices: Prices) -> Prices:
        """The nearest multipliers that satisfy the conditions on signs and sums."""
        balance = np.maximum(prices.balance, 0)
        return Prices(
            share=np.clip(prices.share, SHARE_FLOOR, 1),
            load=np.maximum(prices.load, 0),
            resource=np.maximum(prices.resource, 0),
            cut=np.maximum(prices.cut, 0),
            balance=balance * min(1.0, self.instance.balance_weight / max(float(balance.sum()), 1e-300)),
        )


def _padded(prices: Prices, cuts: int) -> Prices:
    """`prices` with a price of 0 for each new cut."""
    return replace(prices, cut=np.concatenate((prices.cut, np.zeros(cuts))))


def _node_terms(instance: Instance, weight: FloatArray, price: FloatArray) -> FloatArray:
    """min over 0 <= l <= headroom of weight x queue_cost(l) - price x l, in closed form (N,)."""
    free = 1 - instance.background
    top = np.clip(instance.headroom, 0, None)
    with np.errstate(over="ignore"):  # a price near 0 gives an infinite ratio, and so no load
        ratio = np.divide(weight * instance.queue_weight * free, price, out=np.full_like(free, np.inf), where=price > 0)
    load = np.clip(free - np.sqrt(ratio), 0, top)
    terms: FloatArray = weight * instance.queue_cost(load) - price * load
    return terms


def _max_objective_of(instance: Instance) -> float:
    """An upper bound on the objective of every placement."""
    finite = [np.where(np.isfinite(part), part, 0).max() for part in (instance.start, instance.end, *instance.hops)]
    queue = instance.queue_cost(np.clip(instance.headroom, 0, None)).sum()
    return float(queue + instance.fixed.max(axis=1).sum() + instance.shape[0] * sum(finite) + instance.balance_weight)
