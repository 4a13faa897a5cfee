"""The Lagrangian bound: prices on what the nodes' totals consume, improved by column generation.

A column is a whole placement, priced by `IntervalPaths`; the master problem is a small linear program in HiGHS. Every
price vector gives a proven bound, whatever the linear program's tolerances were (docs/planner.md).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import highspy
import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.highs import quiet_highs
from resplit.planner.instance import Instance, IntArray
from resplit.planner.paths import IntervalPaths
from resplit.types import FloatArray

__all__ = ["Dual", "Prices", "Resources"]

ROUNDING = 1e-9  # relative; taken off every bound
SHARE_FLOOR = 1e-9  # the share of an interval's own queueing cost stays positive, so that inf stays inf


@dataclass(frozen=True)
class Prices:
    """Multipliers, all >= 0: `share` (N,) in (0, 1] of an interval's own queueing cost, `load` (N,) per unit of load,
    `resource` (K, N) per unit of a resource, `balance` (N,) with a sum of at most beta."""

    share: FloatArray
    load: FloatArray
    resource: FloatArray
    balance: FloatArray

    def toward(self, other: Prices, step: float) -> Prices:
        """The point at `step` (0..1) of the way to `other`."""
        pairs = (
            (self.share, other.share),
            (self.load, other.load),
            (self.resource, other.resource),
            (self.balance, other.balance),
        )
        return Prices(*((1 - step) * mine + step * theirs for mine, theirs in pairs))


@dataclass(frozen=True)
class Resources:
    """What atoms use of nodes: `use` (K, A), `limit` (K, N). The first is memory in units of the mean atom; the others
    are its integer roundings: with any unit d > 0, sum floor(m_a / d) x[a, i] <= floor(M_i / d) holds for integer x."""

    use: FloatArray
    limit: FloatArray

    @classmethod
    def of(cls, instance: Instance, most_units: int = 3) -> Resources:
        """Memory, and its roundings by the commonest sizes of atoms."""
        unit = max(float(instance.memory.mean()), 1e-300)
        use = [instance.memory / unit]
        limit = [np.minimum(instance.memory_limit, instance.memory.sum()) / unit]
        sizes, counts = np.unique(np.round(use[0], 9), return_counts=True)
        for size in sizes[np.argsort(-counts, kind="stable")][:most_units]:
            if size > 0:
                use.append(np.floor(use[0] / size + 1e-7))
                limit.append(np.floor(limit[0] / size + 1e-6))
        return cls(np.array(use), np.array(limit))


class Dual:
    """The best proven bound so far and the prices that give it."""

    def __init__(self, instance: Instance, paths: IntervalPaths, resources: Resources) -> None:
        self.instance = instance
        self.paths = paths
        self.resources = resources
        nodes = instance.shape[1]
        self.prices = Prices(np.ones(nodes), np.zeros(nodes), np.zeros_like(resources.limit), np.zeros(nodes))
        self.bound = -np.inf

    def evaluate(self, prices: Prices) -> tuple[float, IntArray]:
        """The Lagrangian at `prices` and the placement that attains it; keeps the best. The value is a lower bound on
        the objective of every placement: the node terms are minimised in closed form, the path exactly."""
        share = np.clip(prices.share, SHARE_FLOOR, 1)
        load = np.maximum(prices.load, 0)
        resource = np.maximum(prices.resource, 0)
        balance = np.maximum(prices.balance, 0)
        beta = self.instance.balance_weight
        balance = balance * min(1.0, beta / max(float(balance.sum()), 1e-300))
        price = self._additive(load, resource)
        path_cost, nodes_of = self.paths.shortest(share, price)
        peak = self.instance.background.max()
        value = (
            path_cost
            + node_terms(self.instance, 1 - share, load - balance).sum()
            + balance @ self.instance.background
            + (beta - balance.sum()) * peak
            - (resource * self.resources.limit).sum()
        )
        value -= ROUNDING * (abs(value) + float((resource * self.resources.limit).sum()))
        if value > self.bound:
            self.bound = float(value)
            self.prices = Prices(share, load, resource, balance)
        return float(value), nodes_of

    def _additive(self, load: FloatArray, resource: FloatArray) -> FloatArray:
        finite = np.where(np.isfinite(self.instance.load), self.instance.load, 0)
        return finite * load + self.resources.use.T @ resource  # (A, N)

    def improve(self, columns: list[IntArray], budget: Budget, target: float) -> list[IntArray]:
        """Column generation from `columns` until the bound reaches `target`, nothing improves or the budget is spent.
        Returns the placements that were priced on the way (they may break constraints)."""
        master = _Master(self, max(abs(target), 1e-9) if np.isfinite(target) else 1.0)
        for nodes_of in columns:
            master.add(nodes_of)
        found: list[IntArray] = []
        step = 0.5
        while self.bound < target and budget.spend():
            value, prices = master.solve()
            before = self.bound
            if value - before <= 1e-6 * abs(value):
                break
            bound, nodes_of = self.evaluate(self.prices.toward(prices, step) if np.isfinite(before) else prices)
            if not len(nodes_of):
                break
            found.append(nodes_of)
            improved = bound > before
            step = max(0.2, step * 0.9) if not improved else min(1.0, step * 1.2)
            if not master.add(nodes_of) and not improved:
                _, nodes_of = self.evaluate(prices)
                found.append(nodes_of)
                if not master.add(nodes_of):
                    break
        return found


def node_terms(instance: Instance, weight: FloatArray, price: FloatArray) -> FloatArray:
    """min over 0 <= l <= headroom of weight x queue_cost(l) - price x l, in closed form (N,)."""
    free = 1 - instance.background
    top = np.clip(instance.headroom, 0, None)
    scale = weight * instance.queue_weight * free
    best = free - np.sqrt(np.divide(scale, price, out=np.full_like(scale, np.inf), where=price > 0))
    load = np.clip(np.nan_to_num(best, neginf=0), 0, top)
    terms: FloatArray = weight * instance.queue_cost(load) - price * load
    return terms


class _Master:
    """The restricted master: a mixture of the known placements that pays convex node costs.

    Columns: node costs c_i, loads l_i, the peak m, then one per placement and elastic slacks of the resources.
    """

    def __init__(self, dual: Dual, scale: float) -> None:
        self.dual = dual
        self.scale = scale
        self.known: set[bytes] = set()
        self.tangents: list[tuple[int, float]] = []
        instance, resources = dual.instance, dual.resources
        self.nodes = instance.shape[1]
        self.kinds = len(resources.use)
        self.beta = instance.balance_weight
        self.highs = quiet_highs(presolve="off")
        self._add_node_columns()
        self._add_rows()

    def _add_node_columns(self) -> None:
        instance, n = self.dual.instance, self.nodes
        top = np.clip(instance.headroom, 0, None)
        for _ in range(n):
            self.highs.addCol(1.0, 0.0, highspy.kHighsInf, 0, np.empty(0, np.int32), np.empty(0))
        for i in range(n):
            self.highs.addCol(0.0, 0.0, float(top[i]), 0, np.empty(0, np.int32), np.empty(0))
        peak = float(instance.background.max())
        self.highs.addCol(self.beta / self.scale, peak, 1.0, 0, np.empty(0, np.int32), np.empty(0))

    def _add_rows(self) -> None:
        """Rows: convexity; c_i >= F_i; l_i >= load_i; resources; peak. Then tangents as they are needed."""
        n, inf, highs = self.nodes, highspy.kHighsInf, self.highs
        highs.addRow(1.0, 1.0, 0, np.empty(0, np.int32), np.empty(0))
        for i in range(n):
            highs.addRow(0.0, inf, 1, np.array([i], np.int32), np.array([1.0]))
        for i in range(n):
            highs.addRow(0.0, inf, 1, np.array([n + i], np.int32), np.array([1.0]))
        for limit in self.dual.resources.limit.ravel():
            highs.addRow(-float(limit), inf, 0, np.empty(0, np.int32), np.empty(0))
        if self.beta > 0:
            for i in range(n):
                highs.addRow(
                    float(self.dual.instance.background[i]), inf, 2,
                    np.array([2 * n, n + i], np.int32), np.array([1.0, -1.0]),
                )  # fmt: skip
        self.resource_row = 1 + 2 * n
        self.peak_row = self.resource_row + self.kinds * n
        for row in range(self.resource_row, self.peak_row):
            highs.addCol(1e3, 0.0, inf, 1, np.array([row], np.int32), np.array([1.0]))
        for fraction in (0.5, 0.8, 0.95):
            self._add_tangents(np.clip(self.dual.instance.headroom, 0, None) * fraction, np.arange(n))

    def _add_tangents(self, at: FloatArray, which: IntArray) -> None:
        """c_i >= f_i(v) + f_i'(v) (l_i - v) at the loads v = at[i] of the nodes `which`."""
        instance = self.dual.instance
        cost = instance.queue_cost(at) / self.scale
        free = 1 - instance.background
        slope = instance.queue_weight * free / (free - at) ** 2 / self.scale
        for i in which:
            self.highs.addRow(
                float(cost[i] - slope[i] * at[i]), highspy.kHighsInf, 2,
                np.array([i, self.nodes + i], np.int32), np.array([1.0, -float(slope[i])]),
            )  # fmt: skip

    def add(self, nodes_of: IntArray) -> bool:
        """Adds a placement as a column; False where it is known."""
        key = nodes_of.tobytes()
        if key in self.known or not len(nodes_of):
            return False
        self.known.add(key)
        dual, n = self.dual, self.nodes
        instance = dual.instance
        queue = np.zeros(n)
        bounds = np.concatenate(([0], np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1, [len(nodes_of)]))
        for p, q in itertools.pairwise(bounds):
            queue[nodes_of[p]] += dual.paths.queue[q][p, nodes_of[p]]
        use = np.array([np.bincount(nodes_of, resource, n) for resource in dual.resources.use])
        entries = np.concatenate(([1.0], -queue / self.scale, -instance.loads(nodes_of), -use.ravel()))
        rows = np.flatnonzero(entries).astype(np.int32)
        cost = instance.path_cost(nodes_of) / self.scale
        self.highs.addCol(cost, 0.0, highspy.kHighsInf, len(rows), rows, entries[rows])
        return True

    def solve(self) -> tuple[float, Prices]:
        """Value and prices of the master, tangents added where the mixture's loads call for them."""
        instance, n = self.dual.instance, self.nodes
        for _ in range(30):
            self.highs.run()
            solution = self.highs.getSolution()
            values = np.array(solution.col_value[: 2 * n])
            load = np.minimum(values[n:], np.clip(instance.headroom, 0, None))
            short = instance.queue_cost(load) / self.scale - values[:n]
            which = np.flatnonzero(short > 1e-5)
            if not len(which):
                break
            self._add_tangents(load, which)
        duals = np.array(solution.row_dual[: self.peak_row + (n if self.beta > 0 else 0)])
        prices = Prices(
            duals[1 : 1 + n],
            duals[1 + n : 1 + 2 * n] * self.scale,
            duals[self.resource_row : self.peak_row].reshape(self.kinds, n) * self.scale,
            duals[self.peak_row :] * self.scale if self.beta > 0 else np.zeros(n),
        )
        return float(self.highs.getInfo().objective_function_value) * self.scale, prices
