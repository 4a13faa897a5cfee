"""Explains why a problem has no placement: which constraints conflict, and by how much."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from resplit.planner.bound.resources import Resources
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray
from resplit.units import shown_bytes, shown_exactly

__all__ = ["infeasibility"]

MAX_PACKING_PAIRS = 6000  # pairs of an atom and a node; larger packing problems are skipped
MAX_PACKING_NODES, MAX_PACKING_S = 2000, 1.0
INFEASIBLE = 2  # status of scipy's milp
MARGIN = 1e-6  # relative; results of linear programs count as proofs only beyond their tolerances


def infeasibility(instance: Instance) -> str | None:
    """A proven reason why no placement exists, or None if no check finds one.

    The checks are, in this order: a block that no node may run or hold; total memory; memory with trust; memory in
    whole units; load; and a packing of whole blocks. All but the last let blocks be divided between nodes.
    """
    for find in (
        _block_without_node,
        _oversized_atom,
        _memory_total,
        _memory_shortage,
        _whole_units,
        _overload,
        _packing,
    ):
        if reason := find(instance):
            return reason
    return None


def _block_without_node(instance: Instance) -> str | None:
    problem = instance.problem
    trusted = np.array([node.trusted for node in problem.nodes])
    for block, prefill in zip(problem.blocks, problem.prefill_s_per_token, strict=True):
        if block.private and not trusted.any():
            return f"no trusted node for block {block.name}, which is private (none of {len(trusted)} nodes is trusted)"
        if np.isnan(prefill).all():
            return f"no node can run block {block.name}"
        if block.private and np.isnan(prefill[trusted]).all():
            return f"no trusted node can run block {block.name}, which is private"
    return None


def _oversized_atom(instance: Instance) -> str | None:
    """Blocks that must share a node and are too large for every node that may run them."""
    may_run = np.isfinite(instance.load)
    largest = np.where(may_run, instance.memory_limit, 0).max(axis=1)
    for atom in np.flatnonzero(instance.memory > largest * (1 + MARGIN)):
        last = instance.first[atom + 1] - 1 if atom + 1 < len(instance.first) else len(instance.problem.blocks) - 1
        names = list(dict.fromkeys(instance.problem.blocks[j].name for j in (instance.first[atom], last)))
        return (
            f"memory: {' to '.join(names)} needs {shown_bytes(instance.memory[atom])} on one node, and the largest "
            f"node that may run it has {shown_bytes(largest[atom])}: "
            f"short by {shown_exactly(instance.memory[atom] - largest[atom])}"
        )
    return None


def _memory_total(instance: Instance) -> str | None:
    need, has = instance.memory.sum(), sum(node.memory_bytes for node in instance.problem.nodes)
    if need <= has * (1 + MARGIN):
        return None
    return (
        f"memory short by {shown_exactly(need - has)}: the blocks need {shown_bytes(need)}, "
        f"all nodes together have {shown_bytes(has)}"
    )


def _memory_shortage(instance: Instance) -> str | None:
    """The least memory to add so that all blocks, if divisible, fit on nodes that may run them."""
    may_run = _may_run(instance)
    if not may_run.any(axis=1).all():
        atom = int(np.flatnonzero(~may_run.any(axis=1))[0])
        name = instance.problem.blocks[instance.first[atom]].name
        return f"block {name} may run only on nodes whose background load is above their ceiling"
    unit = instance.memory.mean()
    short_bytes = unit * _elastic(instance, instance.memory[:, None] / unit, instance.memory_limit / unit)
    if short_bytes <= instance.memory.sum() * MARGIN:
        return None
    return (
        f"memory short by {shown_exactly(short_bytes)} on the nodes that may hold the blocks: "
        "memory, trust and the nodes that can run each block conflict"
    )


def _whole_units(instance: Instance) -> str | None:
    """Memory counted in whole units: a node with memory for 8.9 layers holds 8 (see `Resources`)."""
    resources = Resources.of(instance)
    for use, limit, size in zip(resources.use[1:], resources.limit[1:], resources.unit_bytes[1:], strict=True):
        short = _elastic(instance, use[:, None], limit)
        if short > MARGIN * max(1.0, float(use.sum())):
            return (
                f"memory: counted in whole parts of {shown_bytes(size)} (the size of some blocks, which are not "
                f"divided) the blocks need {use.sum():.0f} parts and all nodes have room for {limit.sum():.0f}; "
                "with trust and the nodes that can run each block, at least "
                f"{np.ceil(short - MARGIN * use.sum()):.0f} parts are missing"
            )
    return None


def _elastic(instance: Instance, use: FloatArray, limit: FloatArray) -> float:
    """The least total excess, min sum_i (sum_a use[a] x[a, i] - limit_i)+ over divisible assignments x."""
    may_run = _may_run(instance)
    atoms, nodes = np.nonzero(may_run)
    a, n = instance.shape
    result = linprog(
        np.concatenate((np.zeros(len(atoms)), np.ones(n))),
        A_ub=sparse.hstack((_sums(np.broadcast_to(use, may_run.shape)[atoms, nodes], nodes, n), -sparse.eye_array(n))),
        b_ub=limit,
        A_eq=sparse.hstack((_sums(np.ones(len(atoms)), atoms, a), sparse.csr_array((a, n)))),
        b_eq=np.ones(a),
        method="highs",
    )
    return float(result.fun) if result.status == 0 else 0.0


def _overload(instance: Instance) -> str | None:
    """The largest share of the offered rates that the nodes can serve, if blocks are divisible."""
    atoms, nodes = np.nonzero(_may_run(instance))
    a, n = instance.shape
    unit = max(float(instance.memory.mean()), 1e-300)
    load = _sums(instance.load[atoms, nodes], nodes, n)
    memory = _sums(instance.memory[atoms] / unit, nodes, n)
    assigned = _sums(np.ones(len(atoms)), atoms, a)
    top = np.clip(instance.headroom, 0, None)
    result = linprog(
        np.concatenate((np.zeros(len(atoms)), [1.0])),
        A_ub=sparse.vstack((sparse.hstack((load, -top[:, None])), sparse.hstack((memory, np.zeros((n, 1)))))),
        b_ub=np.concatenate((np.zeros(n), instance.memory_limit / unit)),
        A_eq=sparse.hstack((assigned, np.zeros((a, 1)))),
        b_eq=np.ones(a),
        method="highs",
    )
    if result.status != 0 or result.fun <= 1 + MARGIN:
        return None
    offered = sum(request_class.rate_rps for request_class in instance.problem.classes)
    served = offered / float(result.fun)
    return (
        f"capacity exceeded by {offered - served:.6g} requests/s: {offered:.6g} are offered, and within ceilings and "
        f"memory the nodes serve at most {served:.6g}"
    )


def _packing(instance: Instance) -> str | None:
    """The least memory to add so that whole atoms fit within memory and ceilings.

    This is a mixed-integer program. Its bound is a proof even if it is not solved to optimality.
    """
    atoms, nodes = np.nonzero(_may_run(instance))
    (a, n), count, unit = instance.shape, len(atoms), instance.memory.mean()
    if count > MAX_PACKING_PAIRS:
        return None
    memory = _sums(instance.memory[atoms] / unit, nodes, n)
    load = _sums(instance.load[atoms, nodes], nodes, n)
    assigned = _sums(np.ones(count), atoms, a)
    result = milp(
        np.concatenate((np.zeros(count), np.ones(n))),
        constraints=[
            LinearConstraint(sparse.hstack((memory, -sparse.eye_array(n))), ub=instance.memory_limit / unit),
            LinearConstraint(sparse.hstack((load, sparse.csr_array((n, n)))), ub=np.clip(instance.headroom, 0, None)),
            LinearConstraint(sparse.hstack((assigned, sparse.csr_array((a, n)))), lb=1, ub=1),
        ],
        integrality=np.concatenate((np.ones(count), np.zeros(n))),
        bounds=Bounds(0, np.concatenate((np.ones(count), np.full(n, np.inf)))),
        options={"node_limit": MAX_PACKING_NODES, "time_limit": MAX_PACKING_S},
    )
    if result.status == INFEASIBLE:
        return "capacity exceeded: whole blocks cannot be placed within the nodes' ceilings, even with unlimited memory"
    short = (result.mip_dual_bound or 0.0) - MARGIN
    if short <= MARGIN * a:
        return None
    return (
        f"memory short by at least {shown_exactly(short * unit)}: whole blocks cannot be packed into the nodes "
        "that may hold them, in any order"
    )


def _may_run(instance: Instance) -> NDArray[np.bool_]:
    """Whether an atom may run on a node whose background is within its ceiling (A, N)."""
    return np.asarray(np.isfinite(instance.load) & (instance.headroom >= 0))


def _sums(values: FloatArray, rows: IntArray, height: int) -> sparse.csr_array:
    """A matrix (height, pairs) that sums `values` (pairs,), one per pair of atom and node, into `rows` (pairs,)."""
    return sparse.csr_array((values, (rows, np.arange(len(rows)))), shape=(height, len(rows)))
