"""The restricted master problem: the cheapest convex combination of known placements, a linear program in HiGHS.

Its dual solution suggests prices. `dual` turns prices into a proven bound.
"""

from __future__ import annotations

import highspy
import numpy as np

from resplit.planner.bound.highs import quiet_highs
from resplit.planner.bound.ng_paths import NgPaths
from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.bound.resources import Resources, SetCuts, Support
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["RestrictedMaster"]

INF = highspy.kHighsInf
ELASTIC_COST = 1e3  # per unit, in units of `scale`; lets column generation start from columns that violate limits
NONE = np.empty(0, np.int32)


class RestrictedMaster:
    """Columns: node costs c_i (in units of `scale`), loads l_i, the peak m; then placements and elastic slacks.

    Rows: the weights of the placements sum to 1; c_i >= the queueing cost of the intervals alone; l_i >= the load;
    resources; m >= b_i + l_i. Tangents c_i >= f_i(v) + f_i'(v)(l_i - v) and set cuts are added as needed.
    """

    def __init__(
        self, instance: Instance, paths: IntervalPaths | NgPaths, resources: Resources, cuts: SetCuts, scale: float
    ) -> None:
        self.instance = instance
        self.paths = paths
        self.resources = resources
        self.scale = scale
        self._top = np.clip(instance.headroom, 0, None)
        self._known: dict[bytes, int] = {}  # placement -> column
        self.columns: list[IntArray] = []
        self.value = float("inf")
        self._cuts: list[tuple[SetCuts, int]] = []  # with the index of their first row
        self._highs = quiet_highs(presolve="off")
        self._add_node_columns()
        self._add_rows()
        if len(cuts):
            self.add_cuts(cuts)

    def _add_node_columns(self) -> None:
        n = self.instance.shape[1]
        peak = float(self.instance.background.max())
        for i in range(2 * n):
            top = INF if i < n else float(self._top[i - n])
            self._highs.addCol(float(i < n), 0.0, top, 0, NONE, np.empty(0))
        self._highs.addCol(self.instance.balance_weight / self.scale, peak, 1.0, 0, NONE, np.empty(0))

    def _add_rows(self) -> None:
        n = self.instance.shape[1]
        self._row(1.0, 1.0, [], [])
        for column in range(2 * n):
            self._row(0.0, INF, [column], [1.0])
        for limit in self.resources.limit.ravel():
            self._row(-float(limit), INF, [], [])
        self._first_elastic, self._peak_row = 1 + n, 1 + 2 * n + self.resources.limit.size
        for i in range(n):
            self._row(float(self.instance.background[i]), INF, [2 * n, n + i], [1.0, -1.0])
        for row in range(self._first_elastic, self._peak_row):
            self._elastic(row)
        for fraction in (0.5, 0.8, 0.95):
            self._add_tangents(self._top * fraction, np.arange(n))

    def _row(self, lower: float, upper: float, columns: list[int], values: list[float]) -> None:
        self._highs.addRow(lower, upper, len(columns), np.array(columns, np.int32), np.array(values, float))

    def _elastic(self, row: int) -> None:
        self._highs.addCol(ELASTIC_COST, 0.0, INF, 1, np.array([row], np.int32), np.array([1.0]))

    def _add_tangents(self, at: FloatArray, which: IntArray) -> None:
        """Add tangents at the loads `at` (N,) of the nodes `which`."""
        cost = self.instance.queue_cost(at) / self.scale
        free = 1 - self.instance.background
        slope = self.instance.queue_weight * free / (free - at) ** 2 / self.scale
        for i in which:
            self._row(float(cost[i] - slope[i] * at[i]), INF, [int(i), len(at) + int(i)], [1.0, -float(slope[i])])

    def add(self, nodes_of: IntArray) -> bool:
        """Add a placement (A,) as a column. Returns False if it is known or uses an infeasible interval."""
        key = nodes_of.tobytes()
        if key in self._known or not len(nodes_of):
            return False
        queue = self.paths.queue_paid(nodes_of)
        if not np.isfinite(queue).all():
            return False
        support = Support.of(self.resources, nodes_of)
        entries = np.concatenate(([1.0], -queue / self.scale, -self.instance.loads(nodes_of), -support.used.ravel()))
        rows = np.flatnonzero(entries)
        values = entries[rows]
        for cuts, first in self._cuts:
            rows = np.concatenate((rows, first + np.arange(len(cuts))))
            values = np.concatenate((values, -cuts.excess(support)))
        self._known[key] = self._highs.getNumCol()
        self.columns.append(nodes_of)
        cost = self.instance.path_cost(nodes_of) / self.scale
        self._highs.addCol(cost, 0.0, INF, len(rows), rows.astype(np.int32), values)
        return True

    def add_cuts(self, cuts: SetCuts) -> None:
        """Add a row for each cut: the solution's excess over the cut is at most 0."""
        self._cuts.append((cuts, self._highs.getNumRow()))
        excess = np.array([cuts.excess(Support.of(self.resources, x)) for x in self.columns])  # (columns, M)
        columns = [*self._known.values()]
        for m in range(len(cuts)):
            self._row(0.0, INF, columns, list(-excess[:, m]) if len(columns) else [])
            self._elastic(self._highs.getNumRow() - 1)

    def solve(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Solve the master, set `value` and return the duals in the order of `Prices`.

        Tangents are added until the solution's loads violate none. There must be a column.
        """
        n = self.instance.shape[1]
        for _ in range(30):
            self._highs.run()
            solution = self._highs.getSolution()
            values = np.array(solution.col_value[: 2 * n])
            load = np.minimum(values[n:], self._top)
            which = np.flatnonzero(self.instance.queue_cost(load) / self.scale - values[:n] > 1e-6)
            if not len(which):
                break
            self._add_tangents(load, which)
        duals = np.array(solution.row_dual) * self.scale
        cut = [duals[first : first + len(cuts)] for cuts, first in self._cuts]
        self.value = float(self._highs.getInfo().objective_function_value) * self.scale
        return (
            duals[1 : 1 + n] / self.scale,
            duals[1 + n : 1 + 2 * n],
            duals[1 + 2 * n : self._peak_row].reshape(-1, n),
            np.concatenate([np.empty(0), *cut]),
            duals[self._peak_row : self._peak_row + n],
        )

    def solution(self) -> list[tuple[float, IntArray]]:
        """The placements of the last solution, with their weights."""
        values = self._highs.getSolution().col_value
        columns = zip(self._known.values(), self.columns, strict=True)
        return [(values[k], nodes_of) for k, nodes_of in columns if k < len(values) and values[k] > 1e-9]
