"""The ng-route relaxation (Baldacci, Mingozzi & Roberti 2011): pricing of paths that keep track of visited nodes.

When a path returns to a node, the atoms that it left there count, if every node in between has that node in its
neighbourhood. Without this, a path could exceed a node's memory in several visits and queue at each visit as if the
others did not exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from resplit.planner.bound.labels import MAX_SLOTS, ChainArrays, LabelPool, PricingArrays, cheapest_path
from resplit.planner.bound.node_states import NodeStates
from resplit.planner.bound.paths import IntervalPaths, PathCosts
from resplit.planner.budget import UNLIMITED, Budget
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["Cycle", "Neighbourhoods", "NgPaths", "find_cycles"]

MIN_POOL_LABELS = 32_768
GROWTH = 4  # size of the pool relative to the labels of the last pricing
OVERLOAD_GAIN = 0.01  # of a cycle that overloads a node; the queueing cost is undefined above the ceiling
MIN_GAIN = 1e-7  # cycles of less gain are ignored


@dataclass(frozen=True)
class Cycle:
    """A return to `node` by way of the nodes `between`, whose neighbourhoods do not contain it.

    `gain` is what the master's solution saves by treating the visits separately, as a share of its value.
    """

    node: int
    between: tuple[int, ...]
    gain: float


@dataclass(frozen=True)
class Neighbourhoods:
    """The ng-neighbourhoods: `contains[i, j]` (N, N) is whether labels on node i keep the state of node j.

    With `coarse`, states count memory only.
    """

    contains: NDArray[np.bool_]
    coarse: bool

    @classmethod
    def of(cls, nodes: int, coarse: bool = False) -> Neighbourhoods:
        """Empty neighbourhoods."""
        return cls(np.zeros((nodes, nodes), dtype=bool), coarse)

    def extended(self, cycles: list[Cycle]) -> Neighbourhoods:
        """The least neighbourhoods that contain these and exclude `cycles`."""
        contains = self.contains.copy()
        for cycle in cycles:
            contains[[cycle.node, *cycle.between], cycle.node] = True
        return Neighbourhoods(contains, self.coarse)

    @cached_property
    def slot(self) -> IntArray:
        """The slot of labels for the state of each node (N,); -1 if no neighbourhood contains the node."""
        wanted = self.contains.any(axis=0)
        return np.where(wanted, wanted.cumsum() - 1, -1)

    @property
    def fits_labels(self) -> bool:
        """Whether labels have enough slots."""
        return int(self.contains.any(axis=0).sum()) <= MAX_SLOTS


class NgPaths:
    """Pricing like that of `IntervalPaths`, over ng-route paths.

    When a path returns to a node whose state it kept, the node has the least load and memory that fit this state.
    """

    def __init__(
        self, paths: IntervalPaths, states: NodeStates, neighbourhoods: Neighbourhoods, max_labels: int
    ) -> None:
        self.instance = paths.instance
        self.neighbourhoods = neighbourhoods
        self.overflowed = False
        self.labels = 0  # of the last pricing
        self._paths = paths
        self._node_states = states
        self.max_labels = max_labels
        self._arrays = self._chain_arrays()

    def _chain_arrays(self) -> ChainArrays:
        inst, states, neighbourhoods = self.instance, self._node_states, self.neighbourhoods
        finite = np.where(np.isfinite(inst.load), inst.load, np.inf)
        slotted = np.flatnonzero(neighbourhoods.slot >= 0)
        nodes = inst.shape[1]
        return ChainArrays(
            end=self._ends(),
            load=np.ascontiguousarray(inst.load_prefix),
            memory=inst.memory_prefix,
            least_load=np.vstack((np.minimum.accumulate(finite[::-1])[::-1], np.full((2, nodes), np.inf))),
            least_memory=np.concatenate((np.minimum.accumulate(inst.memory[::-1])[::-1], [np.inf, np.inf])),
            free=1 - inst.background,
            headroom=inst.headroom,
            memory_limit=inst.memory_limit,
            queue_weight=inst.queue_weight,
            hop_of=inst.hop_of.astype(np.int64),
            slot=neighbourhoods.slot.astype(np.int64),
            state=states.before.astype(np.int64),
            unit_bytes=states.unit_bytes,
            state_load=np.hstack((states.load[:, slotted].T, np.full((len(slotted), 1), np.inf))),
            state_memory=np.append(states.memory, np.inf),
            packed=np.append(states.packed, np.uint64((1 << states.bits) - 1) & ~states.guard),
            guard=states.guard,
            bits=states.bits,
        )

    def _ends(self) -> NDArray[np.int64]:
        """The last boundary of a feasible interval from each atom on each node (A, N)."""
        atoms, nodes = self.instance.shape
        ends = np.zeros((atoms, nodes), np.int64)
        for q in range(1, atoms + 1):
            ends[:q] = np.where(np.isfinite(self._paths.queue[q]), q, ends[:q])
        return ends

    def shortest(self, costs: PathCosts, cutoff: float = np.inf, budget: Budget = UNLIMITED) -> tuple[float, IntArray]:
        """Cost and nodes (A,) of the cheapest path.

        The result is (cutoff, ()) if no path costs less than `cutoff`, and (-inf, ()) if the label limit or the time
        of `budget` does not suffice.
        """
        prices = self._pricing_arrays(costs, cutoff)
        size = min(max(MIN_POOL_LABELS, GROWTH * self.labels), self.max_labels)
        while True:
            pool = LabelPool.of(size, len(self._arrays.state_load), len(self._arrays.end))
            labels, cost, nodes_of = cheapest_path(self._arrays, prices, pool, budget)
            if labels >= 0 or size >= self.max_labels or budget.left_s <= 0:
                break
            size = min(GROWTH**2 * size, self.max_labels)
        self.overflowed = labels < 0
        self.labels = size if self.overflowed else int(labels)
        if self.overflowed or not cost < cutoff:
            return -np.inf if self.overflowed else cutoff, np.empty(0, dtype=np.intp)
        return float(cost), nodes_of.astype(np.intp)

    def _pricing_arrays(self, costs: PathCosts, cutoff: float) -> PricingArrays:
        """The arrays of one pricing.

        Bounds from plain paths drop labels that cannot stay below `cutoff`, and states of nodes to which no path below
        `cutoff` can return.
        """
        potentials = self._paths.potentials(costs)
        atoms, nodes = self.instance.shape
        returns = potentials.enter + potentials.after_enter < cutoff  # (A + 1, N)
        last = np.where(returns.any(axis=0), atoms - returns[::-1].argmax(axis=0), -1)
        slotted = np.flatnonzero(self.neighbourhoods.slot >= 0)  # in the order of their slots
        again = np.arange(atoms + 1)[:, None, None] <= last[slotted]
        kept = self.neighbourhoods.contains[:, slotted] & again  # (A + 1, here, slots)
        bits = np.uint64(1) << np.arange(len(slotted), dtype=np.uint64)
        return PricingArrays(
            share=costs.share,
            atom=potentials.prefix,
            start=self.instance.start - costs.start_refund,
            finish=self.instance.end,
            hops=np.array(potentials.hops).reshape(-1, nodes, nodes),
            enter_below=_less(cutoff, potentials.after_enter),
            leave_below=_less(cutoff, potentials.after_leave),
            keep=(kept * bits).sum(axis=2, dtype=np.uint64),
        )

    def queue_paid(self, nodes_of: IntArray) -> FloatArray:
        """Queueing cost of a path by node (N,) at a share of 1; inf if it exceeds the limits of a node."""
        inst = self.instance
        paid = np.zeros(inst.shape[1])
        for p, q, node, held in self._steps(nodes_of):
            load, memory = (self._node_states.load[held, node], self._node_states.memory[held]) if held else (0.0, 0.0)
            busy = load + inst.load_prefix[q, node] - inst.load_prefix[p, node]
            filled = memory + inst.memory_prefix[q] - inst.memory_prefix[p]
            free = 1 - inst.background[node]
            fits = np.isfinite(self._paths.queue[q][p, node])
            if not fits or busy > inst.headroom[node] or filled > inst.memory_limit[node]:
                paid[node] = np.inf
            else:
                paid[node] += inst.queue_weight[node] * (busy / (free - busy) - load / (free - load))
        return paid

    def _steps(self, nodes_of: IntArray) -> Iterator[tuple[int, int, int, int]]:
        """The intervals (p, q, node) of a path, with the kept state of the node."""
        states, held = self._node_states, dict[int, int]()
        for p, q in pairwise(map(int, _ends(nodes_of))):
            node = int(nodes_of[p])
            held = {other: state for other, state in held.items() if self.neighbourhoods.contains[node, other]}
            state = held.get(node, 0)
            yield p, q, node, state
            if self.neighbourhoods.slot[node] >= 0:
                taken_bytes = float(self.instance.memory_prefix[q] - self.instance.memory_prefix[p])
                held[node] = states.after(state, p, q, float(states.memory[state]) + taken_bytes)


def find_cycles(
    instance: Instance, solution: list[tuple[float, IntArray]], neighbourhoods: Neighbourhoods, value: float
) -> list[Cycle]:
    """The cycles in the weighted paths of `solution` that the neighbourhoods do not exclude.

    They are ordered by their gain per node that has to be added. `value` is the value of the solution.
    """
    gain: dict[tuple[int, tuple[int, ...]], float] = defaultdict(float)
    for weight, nodes_of in solution:
        ends = _ends(nodes_of)
        last: dict[int, int] = {}
        for step, (p, q) in enumerate(pairwise(ends)):
            node = int(nodes_of[p])
            if node in last:
                before = last[node]
                between = {int(nodes_of[b]) for b in ends[before + 1 : step]}
                between = {other for other in between if not neighbourhoods.contains[other, node]}
                first = int(ends[before]), int(ends[before + 1])
                amount = weight * _gain(instance, node, first, (int(p), int(q)), value)
                if between and amount > MIN_GAIN:
                    gain[node, tuple(sorted(between))] += amount
            last[node] = step
    found = [Cycle(node, between, amount) for (node, between), amount in gain.items()]
    return sorted(found, key=lambda cycle: -cycle.gain / len(cycle.between))


def _gain(instance: Instance, node: int, first: tuple[int, int], second: tuple[int, int], value: float) -> float:
    """The excess over limits and the queueing cost that a path saves by counting two intervals on a node separately."""
    loads = [instance.load_prefix[q, node] - instance.load_prefix[p, node] for p, q in (first, second)]
    filled = sum(instance.memory_prefix[q] - instance.memory_prefix[p] for p, q in (first, second))
    over = max(0.0, float(filled - instance.memory_limit[node])) / max(float(instance.memory.sum()), 1e-300)
    if sum(loads) > instance.headroom[node]:
        return over + OVERLOAD_GAIN
    free = 1 - instance.background[node]
    queue = [instance.queue_weight[node] * load / (free - load) for load in (sum(loads), *loads)]
    return over + float(queue[0] - queue[1] - queue[2]) / max(abs(value), 1e-300)


def _ends(nodes_of: IntArray) -> IntArray:
    return np.concatenate(([0], np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1, [len(nodes_of)]))


def _less(cutoff: float, cost: FloatArray) -> FloatArray:
    """cutoff - cost; -inf if the cost is inf."""
    return np.where(np.isfinite(cost), cutoff - np.where(np.isfinite(cost), cost, 0), -np.inf)
