"""The mixed-integer program over intervals (docs/planner.md), solved by branch and bound in HiGHS.

Reduced-cost fixing first removes every interval and hop that no placement below the cutoff can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from scipy import sparse

from resplit.planner.bound.dual import Dual
from resplit.planner.bound.highs import quiet_highs
from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["CLOCK_DELAY_S", "Candidates", "candidates", "solve_mip"]

STEPS_PER_NODE = 10  # steps of the work limit for one node of the search tree
CLOCK_DELAY_S = 8e-5  # per candidate; HiGHS reads the clock only between steps, which take about this long
TOLERANCE = 1e-6  # relative; subtracted from HiGHS's bound, whose linear programs have a tolerance of 1e-7


@dataclass(frozen=True)
class Candidates:
    """The intervals, rows (p, q, i), and hops, rows (b, i, k), that a placement below the cutoff may use."""

    intervals: IntArray
    hops: IntArray

    def __len__(self) -> int:
        return len(self.intervals) + len(self.hops)


def candidates(dual: Dual, cutoff: float) -> Candidates:
    """Reduced-cost fixing: keep the intervals and hops whose cheapest path is below `cutoff`."""
    instance, prices = dual.instance, dual.plain_prices
    atoms = instance.shape[0]
    potentials = dual.paths.potentials(dual.path_costs(prices))
    left = cutoff - dual.constant_terms(prices)
    intervals, hops = [], []
    for q in range(1, atoms + 1):
        steps = prices.share * dual.paths.queue[q] + potentials.prefix[q] - potentials.prefix[:q]
        p, i = np.nonzero(potentials.enter[:q] + steps + potentials.after_leave[q] < left)
        intervals.append(np.column_stack((p, np.full(len(p), q), i)))
        if q < atoms:
            i, k = np.nonzero(
                potentials.leave[q][:, None] + potentials.hops[instance.hop_of[q]] + potentials.after_enter[q] < left
            )
            hops.append(np.column_stack((np.full(len(i), q), i, k)))
    return Candidates(np.concatenate(intervals), np.concatenate(hops or [np.empty((0, 3), dtype=np.intp)]))


def solve_mip(
    dual: Dual, chosen: Candidates, cutoff: float, budget: Budget, incumbent: IntArray | None, relative_gap: float
) -> tuple[IntArray | None, float]:
    """The best placement (A,) that HiGHS finds among `chosen`, and a bound on all placements.

    Placements with removed intervals or hops cost at least `cutoff`. So the bound is `cutoff`, which may be inf, once
    it is proven that all other placements cost no less.
    """
    extra_tangents: list[FloatArray] = []
    while len(chosen.intervals):
        nodes_of, bound = _Model(dual, chosen, extra_tangents).solve(budget, incumbent, relative_gap)
        bound = min(max(bound, dual.bound), cutoff)
        if nodes_of is None or budget.spent or bound >= cutoff * (1 - relative_gap):
            return nodes_of, bound
        cost = dual.instance.cost(nodes_of)
        load = dual.instance.loads(nodes_of)
        if bound >= cost * (1 - 2 * relative_gap) or any(np.array_equal(load, at) for at in extra_tangents):
            return nodes_of, bound
        extra_tangents.append(load)  # node costs were underestimated, as nodes hold several segments
    return None, cutoff


class _Model:
    """The program. Columns: intervals y (binary), hops z, node costs c (in units of `scale`), loads l, the peak m.

    A load is in units of that of the whole model on its node, as HiGHS takes tiny entries for 0.
    """

    def __init__(self, dual: Dual, chosen: Candidates, extra_tangents: list[FloatArray]) -> None:
        self.dual = dual
        self.chosen = chosen
        self.extra_tangents = extra_tangents
        self.instance: Instance = dual.instance
        self.atoms, self.nodes = self.instance.shape
        self.scale = abs(dual.bound) or 1.0  # the unit of costs, as HiGHS's tolerances are absolute
        whole = self.instance.load_prefix[-1]
        self.load_unit = np.where(whole > 0, whole, 1.0)  # (N,)
        self.p, self.q, self.i = chosen.intervals.T
        self.steps = len(chosen.intervals)
        self.width = self.steps + len(chosen.hops) + 2 * self.nodes + 1
        self.node_column = self.steps + len(chosen.hops)

    def _costs(self) -> FloatArray:
        inst = self.instance
        cost = np.zeros(self.width)
        cost[: self.steps] = (
            inst.fixed_prefix[self.q, self.i]
            - inst.fixed_prefix[self.p, self.i]
            + np.where(self.p == 0, inst.start[self.i], 0)
            + np.where(self.q == self.atoms, inst.end[self.i], 0)
        )
        b, i, k = self.chosen.hops.T
        for kind, hop in enumerate(inst.hops):
            mine = inst.hop_of[b] == kind
            cost[self.steps : self.node_column][mine] = hop[i[mine], k[mine]]
        cost[-1] = inst.balance_weight
        cost /= self.scale
        cost[self.node_column : self.node_column + self.nodes] = 1
        return cost

    def _rows(self) -> tuple[sparse.csr_array, FloatArray, FloatArray]:
        """The matrix of all rows, and their lower and upper limits."""
        inst, n = self.instance, self.nodes
        b, i, k = self.chosen.hops.T
        steps, hops = np.arange(self.steps), self.steps + np.arange(len(self.chosen.hops))
        inner_end, inner_start = self.q < self.atoms, self.p > 0
        leave = self._matrix(  # flow conservation: an interval that ends at (b, i) is followed by a hop from there
            [(self.q * n + self.i)[inner_end], b * n + i], [steps[inner_end], hops], [1.0, -1.0], self.atoms * n
        )
        enter = self._matrix(
            [(self.p * n + self.i)[inner_start], b * n + k], [steps[inner_start], hops], [1.0, -1.0], self.atoms * n
        )
        one = self._matrix([np.zeros(int((~inner_start).sum()), dtype=np.intp)], [steps[~inner_start]], [1.0], 1)
        c, load = self.node_column + np.arange(n), self.node_column + n + np.arange(n)
        queue = np.array([self.dual.paths.queue[q][p, i] for p, q, i in self.chosen.intervals])
        added_load = (inst.load_prefix[self.q, self.i] - inst.load_prefix[self.p, self.i]) / self.load_unit[self.i]
        alone = self._matrix([self.i, np.arange(n)], [steps, c], [-queue / self.scale, 1.0], n)
        total = self._matrix([self.i, np.arange(n)], [steps, load], [-added_load, 1.0], n)
        use = np.hstack([np.zeros((len(self.dual.resources.use), 1)), self.dual.resources.use.cumsum(axis=1)])
        stored = [self._matrix([self.i], [steps], [u[self.q] - u[self.p]], n) for u in use]
        cut_rows = self._set_cuts(use)
        peak = self._matrix([np.arange(n), np.arange(n)], [np.full(n, self.width - 1), load], [1.0, -self.load_unit], n)
        tangents, tangent_lower = self._tangents(c, load)
        matrix = sparse.vstack([leave, enter, one, alone, total, *stored, cut_rows, peak, tangents], format="csr")
        flows, kinds = 2 * self.atoms * n, len(stored)
        inf = highspy.kHighsInf
        lower = np.concatenate(
            (np.zeros(flows), [1.0], np.zeros(2 * n), np.full(kinds * n + len(self.dual.cuts), -inf),
             inst.background, tangent_lower)
        )  # fmt: skip
        upper = np.concatenate(
            (np.zeros(flows), [1.0], np.full(2 * n, inf), self.dual.resources.limit.ravel(),
             -self.dual.cuts.constant_use, np.full(n + len(tangent_lower), inf))
        )  # fmt: skip
        return matrix, lower, upper

    def _set_cuts(self, use: FloatArray) -> sparse.csr_array:
        """A row for each cut: use of a set of nodes less its limit times the entries."""
        cuts = self.dual.cuts
        _, i, k = self.chosen.hops.T
        matrix = np.zeros((len(cuts), self.width))
        inside = cuts.members[:, self.i]
        taken = np.vstack((use[:, self.q] - use[:, self.p], np.zeros(self.steps)))  # (K + 1, steps), last ENTRY's
        matrix[:, : self.steps] = inside * (taken[cuts.resource] - cuts.limit[:, None] * (self.p == 0))
        enters = (1 - cuts.members[:, i]) * cuts.members[:, k]
        matrix[:, self.steps : self.node_column] = -cuts.limit[:, None] * enters
        return sparse.csr_array(matrix)

    def _tangents(self, c: IntArray, load: IntArray) -> tuple[sparse.csr_array, FloatArray]:
        inst, n = self.instance, self.nodes
        fractions = (0.15, 0.3, 0.42, 0.54, 0.65, 0.74, 0.82, 0.89, 0.95, 1.0)
        top = np.clip(inst.headroom, 0, None)
        at = np.concatenate([*(fraction * top for fraction in fractions), *self.extra_tangents])
        at = np.minimum(at, np.tile(top, len(at) // n))
        node = np.tile(np.arange(n), len(at) // n)
        free = (1 - inst.background)[node]
        weight = inst.queue_weight[node] / self.scale
        slope = weight * free / (free - at) ** 2
        rows = np.arange(len(at))
        matrix = self._matrix([rows, rows], [c[node], load[node]], [1.0, -slope * self.load_unit[node]], len(at))
        return matrix, weight * at / (free - at) - slope * at

    def _matrix(
        self, rows: list[IntArray], columns: list[IntArray], values: list[FloatArray | float], height: int
    ) -> sparse.csr_array:
        filled = [np.broadcast_to(v, r.shape) for v, r in zip(values, rows, strict=True)]
        return sparse.csr_array(
            (np.concatenate(filled), (np.concatenate(rows), np.concatenate(columns))), shape=(height, self.width)
        )

    def _program(self) -> Any:
        matrix, lower, upper = self._rows()
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.width, matrix.shape[0]
        lp.col_cost_ = self._costs()
        lp.col_lower_ = np.concatenate((np.zeros(self.width - 1), [self.instance.background.max()]))
        top = np.clip(self.instance.headroom, 0, None) / self.load_unit
        lp.col_upper_ = np.concatenate((np.ones(self.node_column), np.full(self.nodes, highspy.kHighsInf), top, [1.0]))
        lp.row_lower_, lp.row_upper_ = lower, upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
        kinds = [highspy.HighsVarType.kInteger] * self.steps
        lp.integrality_ = kinds + [highspy.HighsVarType.kContinuous] * (self.width - self.steps)
        return lp

    def solve(self, budget: Budget, incumbent: IntArray | None, relative_gap: float) -> tuple[IntArray | None, float]:
        """The best placement found (A,), or None, and the proven bound; (None, inf) if the program is infeasible."""
        highs = quiet_highs(mip_rel_gap=relative_gap, mip_abs_gap=0.0)
        if budget.steps_left is None:
            highs.setOptionValue("time_limit", max(budget.left_s - CLOCK_DELAY_S * len(self.chosen), 0.0))
        else:
            highs.setOptionValue("mip_max_nodes", max(budget.steps_left // STEPS_PER_NODE, 1))
        highs.passModel(self._program())
        if incumbent is not None and (start := self._start(incumbent)) is not None:
            highs.setSolution(self.steps, np.arange(self.steps, dtype=np.int32), start)
        highs.run()
        info = highs.getInfo()
        if budget.steps_left is not None:
            budget.spend(STEPS_PER_NODE * max(1, int(info.mip_node_count)))
        if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return None, float("inf")
        bound = (info.mip_dual_bound - TOLERANCE * abs(info.mip_dual_bound)) * self.scale
        if info.primal_solution_status != 2:
            return None, float(bound)
        values = np.array(highs.getSolution().col_value[: self.steps])
        return self._placement(values), float(bound)

    def _start(self, nodes_of: IntArray) -> FloatArray | None:
        changes = np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1
        wanted = {
            (int(p), int(q), int(nodes_of[p])) for p, q in zip([0, *changes], [*changes, self.atoms], strict=True)
        }
        start = np.array([tuple(row) in wanted for row in self.chosen.intervals.tolist()], dtype=float)
        return start if start.sum() == len(wanted) else None

    def _placement(self, values: FloatArray) -> IntArray:
        nodes_of = np.empty(self.atoms, dtype=np.intp)
        for p, q, i in self.chosen.intervals[values > 0.5]:
            nodes_of[p:q] = i
        return nodes_of
