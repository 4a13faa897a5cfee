"""The plain convex relaxation in cvxpy, next to its mathematics; tests compare the faster bounds with it.

The solvers do not use it. It is practical up to about 16 nodes and 40 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray

from resplit.planner.bound.dual import Prices
from resplit.planner.instance import Instance
from resplit.types import FloatArray

__all__ = ["Relaxation", "relax_convex"]


@dataclass(frozen=True)
class Relaxation:
    """The solution of the relaxation.

    `value` is the primal value, within the solver's tolerance, and so not a proven bound. `placement` (A, N) is
    fractional. `prices` are the multipliers; `Dual.evaluate` makes a proven bound of them.
    """

    value: float
    placement: FloatArray
    prices: Prices


def relax_convex(instance: Instance) -> Relaxation | None:
    """Solve the relaxation; None if it is infeasible:

        minimise    sum_b <T_b, z_b> + <start, x_0> + <end, x_A-1> + <fixed, x>
                    + sum_i a_i (1 - b_i) (1 / (1 - u_i) - 1 / (1 - b_i)) + beta m
        subject to  sum_i x_ai = 1                                 every atom on one node (eq. 4)
                    sum_k z_b,ik = x_b-1,i,  sum_i z_b,ik = x_b,k  a flow along the chain
                    u_i >= b_i + sum_a load_ai x_ai,  u_i <= max(u_max_i, b_i)
                    sum_a memory_a x_ai <= memory_i                (eq. 5)
                    m >= u_i,  x >= 0,  z >= 0

    with a_i = alpha / (L rho_i). `load` contains rho_i, and `fixed` the energy. `1 / (1 - u)` is the convex atom
    `inv_pos`. The utilization u is a variable of its own, as disciplined parametrised programming (DPP) requires.
    """
    atoms, nodes = instance.shape
    x = cp.Variable((atoms, nodes), nonneg=True)
    u, m = cp.Variable(nodes), cp.Variable()
    runs = np.isfinite(instance.load) & (instance.headroom >= 0)
    load = cp.sum(cp.multiply(np.where(runs, instance.load, 0), x), axis=0)
    loaded = u >= instance.background + load
    stored = (instance.memory / instance.memory.mean()) @ x <= instance.memory_limit / instance.memory.mean()
    peaked = m >= u
    transfers, flow = _transfers(instance, x)
    constraints = [
        cp.sum(x, axis=1) == 1,
        *_zero(x, ~runs),
        u <= instance.background + np.clip(instance.headroom, 0, None),
        loaded,
        stored,
        peaked,
        *flow,
    ]
    queues = cp.sum(cp.multiply(instance.queue_weight * (1 - instance.background), cp.inv_pos(1 - u)))
    cost = (
        transfers
        + cp.sum(cp.multiply(instance.fixed, x))
        + (queues - instance.queue_weight.sum())
        + instance.balance_weight * m
    )
    program = cp.Problem(cp.Minimize(cost), constraints)
    program.solve(solver=cp.CLARABEL)
    if x.value is None:
        return None
    prices = Prices(np.zeros(nodes), loaded.dual_value, stored.dual_value[None], np.zeros(0), peaked.dual_value)
    return Relaxation(float(program.value), x.value, prices)


def _transfers(instance: Instance, x: Any) -> tuple[Any, list[Any]]:
    """The cost of all transfers from the start of the chain to its end under `x` (A, N), and their constraints."""
    last = instance.shape[0] - 1
    parts = [_at_an_end(x[0], instance.start), _at_an_end(x[last], instance.end)]
    parts += [_along_the_chain(x[b - 1], x[b], instance.hop(b)) for b in range(1, last + 1)]
    return sum(cost for cost, _ in parts), [constraint for _, constraints in parts for constraint in constraints]


def _at_an_end(x: Any, cost: FloatArray) -> tuple[Any, list[Any]]:
    """The cost of the start or the end of the chain on nodes `x` (N,), and its constraints: no link that is missing."""
    linked = np.isfinite(cost)
    return np.where(linked, cost, 0) @ x, _zero(x, ~linked)


def _along_the_chain(x: Any, following: Any, cost: FloatArray) -> tuple[Any, list[Any]]:
    """The cost of the flow between the nodes of an atom `x` (N,) and those of the next, and its constraints."""
    linked = np.isfinite(cost) | np.eye(len(cost), dtype=bool)
    z = cp.Variable(cost.shape, nonneg=True)
    transfer = np.where(linked & ~np.eye(len(cost), dtype=bool), cost, 0)
    return cp.sum(cp.multiply(transfer, z)), [
        cp.sum(z, axis=1) == x,
        cp.sum(z, axis=0) == following,
        *_zero(z, ~linked),
    ]


def _zero(variable: Any, where: NDArray[np.bool_]) -> list[Any]:
    """The constraint that `variable` is zero where `where` is true, if that is anywhere."""
    return [variable[where] == 0] if where.any() else []
