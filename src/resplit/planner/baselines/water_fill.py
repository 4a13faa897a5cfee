"""The baseline `water-fill`: the fewest nodes that hold the model, with blocks in proportion to their speed.

The memory of a node limits its blocks. This is Parallax's layer allocation.
"""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome
from resplit.types import FloatArray

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Take nodes by capacity until the model fits, find the water level by bisection, and order nodes by link cost."""
    atoms = instance.shape[0]
    finite = np.where(np.isfinite(instance.load), instance.load, 0)
    capacity = np.minimum(np.floor(instance.memory_limit / (float(instance.memory.mean()) or 1.0)), atoms)
    capacity[(instance.headroom <= 0) | ~np.isfinite(instance.load).any(axis=0)] = 0
    by_size = np.argsort(-capacity, kind="stable")
    count = int(np.searchsorted(capacity[by_size].cumsum(), atoms)) + 1
    if count > len(by_size):
        return Outcome(None, -np.inf, "memory: the nodes together hold fewer blocks of mean size than the model has")
    chosen = by_size[:count]
    speed = np.maximum(instance.headroom[chosen], 1e-12) / np.maximum(finite[:, chosen].mean(axis=0), 1e-12)
    shares = _levels(capacity[chosen], speed, atoms)
    order = _nearest_order(instance, chosen)
    return Outcome(np.repeat(chosen[order], shares[order]), -np.inf)


def _levels(capacity: FloatArray, speed: FloatArray, atoms: int) -> IntArray:
    """The number of atoms per node, min(capacity, level x speed), rounded so that the sum is `atoms`."""
    low, high = 0.0, atoms / float(speed.min())
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(capacity, level * speed).sum() < atoms else (low, level)
    exact = np.minimum(capacity, high * speed)
    shares = np.floor(exact + 1e-9).astype(np.intp)
    for i in np.argsort(shares - exact, kind="stable"):
        if shares.sum() < atoms and shares[i] < capacity[i]:
            shares[i] += 1
    while shares.sum() < atoms:
        shares[int((capacity - shares).argmax())] += 1
    return shares


def _nearest_order(instance: Instance, chosen: IntArray) -> list[int]:
    """The positions in `chosen`, first the node nearest to the sources, then always the nearest node that is left."""
    hop = instance.hops[0]
    order = [int(instance.start[chosen].argmin())]
    while len(order) < len(chosen):
        rest = [i for i in range(len(chosen)) if i not in order]
        order.append(min(rest, key=lambda i: float(hop[chosen[order[-1]], chosen[i]])))
    return order
