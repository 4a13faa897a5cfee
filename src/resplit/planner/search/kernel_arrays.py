"""The arrays of an instance in the form that the compiled moves take."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from resplit.planner.instance import Instance
from resplit.types import FloatArray

__all__ = ["KernelArrays"]

NEAREST = 12  # nodes listed per node, those with the lowest cost to move to
MIN_EXCESS_ATOMS, MIN_EXCESS_LOAD = 0.5, 0.05  # least excess counted for a violation: mean atoms, share of a node

Indices = np.ndarray[Any, np.dtype[np.int64]]


class KernelArrays(NamedTuple):
    """The arrays of `Instance`, except for these:

    - `ends` (2, N): transfer costs to the first and from the last node.
    - `hops` (kinds, N, N): 0 from a node to itself.
    - `nearest` (N, K): the nodes with the lowest cost to move to from each node.
    - `peak`: the highest background.
    - `min_excess` (2,): the least excess counted for a violation of a memory limit (bytes) and of a load limit.
    """

    load: FloatArray
    fixed: FloatArray
    memory: FloatArray
    memory_limit: FloatArray
    ends: FloatArray
    hops: FloatArray
    hop_of: Indices
    background: FloatArray
    headroom: FloatArray
    nearest: Indices
    queue_weight: FloatArray
    balance_weight: float
    peak: float
    min_excess: FloatArray

    @classmethod
    def of(cls, instance: Instance) -> KernelArrays:
        """The arrays of `instance`, contiguous in memory."""
        nodes = instance.shape[1]
        cost_to = instance.hops[0] + np.median(instance.alone_cost(), axis=0)
        nearest = np.argsort(cost_to, axis=1, kind="stable")[:, : max(1, min(NEAREST, nodes - 1))]
        hops = np.array(instance.hops)
        hops[:, np.arange(nodes), np.arange(nodes)] = 0
        return cls(
            load=np.ascontiguousarray(instance.load),
            fixed=np.ascontiguousarray(instance.fixed),
            memory=instance.memory,
            memory_limit=instance.memory_limit,
            ends=np.array([instance.start, instance.end]),
            hops=hops,
            hop_of=instance.hop_of.astype(np.int64),
            background=instance.background,
            headroom=instance.headroom,
            nearest=np.ascontiguousarray(nearest, np.int64),
            queue_weight=instance.queue_weight,
            balance_weight=float(instance.balance_weight),
            peak=float(instance.background.max()),
            min_excess=np.array([MIN_EXCESS_ATOMS * float(instance.memory.mean()), MIN_EXCESS_LOAD]),
        )
