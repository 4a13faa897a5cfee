"""The linear rows of the relaxation: limits on the resources of a node, and of a set of nodes that a path enters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from resplit.planner.bound.node_states import NodeStates
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["Resources", "SetCuts", "Support"]

MAX_STATE_ENTRIES = 4_000_000  # states x kinds x nodes; more are not enumerated
MAX_NODES = 64  # beyond, the prices of more rows cost more time than they gain
MAX_KIND_SETS = 15  # sets of kinds with a row of their own, the smallest first
MIN_ENTRY_DEFICIT = 1e-3  # of the entries of a set in the master's solution
SLACK = 1e-9  # relative


@dataclass(frozen=True)
class Resources:
    """The K resources of nodes: each atom uses `use` (K, A), and a node has `limit` (K, N).

    The first resource is memory in units of the mean atom. The others are its integer roundings: for each unit d > 0,
    sum_a floor(m_a / d) x[a, i] <= floor(M_i / d) holds for integer x. `unit_bytes` (K,) holds the units, NaN if a
    resource counts atoms in another way.
    """

    use: FloatArray
    limit: FloatArray
    unit_bytes: FloatArray

    @classmethod
    def of(cls, instance: Instance, most_units: int = 3) -> Resources:
        """Memory, and its roundings by the most common sizes of atoms."""
        unit = max(float(instance.memory.mean()), 1e-300)
        use, units = [instance.memory / unit], [unit]
        limit = [np.minimum(instance.memory_limit, instance.memory.sum()) / unit]
        sizes, counts = np.unique(np.round(use[0], 9), return_counts=True)
        for size in sizes[np.argsort(-counts, kind="stable")][:most_units]:
            if size > 0:
                use.append(np.floor(use[0] / size + 1e-8))
                limit.append(np.floor(limit[0] / size + 1e-6))
                units.append(float(size) * unit)
        return cls(np.array(use), np.array(limit), np.array(units))

    def tightened(self, instance: Instance, states: NodeStates) -> Resources:
        """These resources with tighter limits, and more resources. No feasible node state violates them.

        A limit becomes the most that any feasible node state uses. The further resources count the atoms of some kinds
        as one each, and memory in halves of the most common sizes.
        """
        kinds = states.held.shape[1]
        nodes = self.limit.shape[1]
        if states.held.size * nodes > MAX_STATE_ENTRIES or nodes > MAX_NODES:
            return self
        several = [some for size in range(1, kinds + 1) for some in combinations(range(kinds), size)]
        counted = [np.isin(states.kind, some).astype(float) for some in several[:MAX_KIND_SETS]]
        halves = [np.floor(instance.memory / (unit / 2) + 1e-8) for unit in self.unit_bytes[1:]]
        use = np.array([*self.use, *counted, *halves])
        fits = _fitting(instance, states)
        of_kind = np.array([use[:, states.kind == kind].max(axis=1) for kind in range(kinds)])  # (kinds, K)
        most = np.array([np.where(fits, each[:, None], 0).max(axis=0) for each in (states.held @ of_kind).T])
        most[: len(self.use)] = np.minimum(most[: len(self.use)], self.limit)
        # Rows that no state reaches, or that all atoms together satisfy, exclude nothing.
        matters = ((most > 0) & (most < use.sum(axis=1)[:, None])).any(axis=1)
        matters[: len(self.use)] = True
        units = np.concatenate((self.unit_bytes, np.full(len(use) - len(self.use), np.nan)))
        return Resources(use[matters], most[matters] * (1 + SLACK), units[matters])


def _fitting(instance: Instance, states: NodeStates) -> NDArray[np.bool_]:
    """Which states each node can hold and run (L, N)."""
    kinds = range(states.held.shape[1])
    runs = np.array([np.isfinite(instance.load[states.kind == kind]).any(axis=0) for kind in kinds])
    fits = (states.memory[:, None] <= instance.memory_limit) & (states.load <= instance.headroom)
    return np.asarray(fits & (states.held @ ~runs == 0))


@dataclass(frozen=True)
class Support:
    """Weighted placements, summed over boundaries.

    `crossings` (N, N) counts the uses of each link, `starts` (N,) the paths that start at each node, `used` (K, N) the
    use of each resource.
    """

    crossings: FloatArray
    starts: FloatArray
    used: FloatArray

    @classmethod
    def of(cls, resources: Resources, nodes_of: IntArray) -> Support:
        """The support of one placement of atoms."""
        n = resources.limit.shape[1]
        crossings, starts = np.zeros((n, n)), np.zeros(n)
        changes = np.flatnonzero(nodes_of[1:] != nodes_of[:-1])
        np.add.at(crossings, (nodes_of[changes], nodes_of[changes + 1]), 1.0)
        starts[nodes_of[0]] = 1.0
        return cls(crossings, starts, np.array([np.bincount(nodes_of, use, n) for use in resources.use]))

    @classmethod
    def of_solution(cls, resources: Resources, solution: list[tuple[float, IntArray]]) -> Support:
        """The support of weighted placements, of which there must be at least one."""
        parts = [(weight, cls.of(resources, nodes_of)) for weight, nodes_of in solution]
        return cls(
            np.sum([weight * part.crossings for weight, part in parts], axis=0),
            np.sum([weight * part.starts for weight, part in parts], axis=0),
            np.sum([weight * part.used for weight, part in parts], axis=0),
        )


def _too_small(resources: Resources, members: FloatArray) -> NDArray[np.bool_]:
    """Which sets of nodes (M, N) have too little of a resource for the whole chain (M,)."""
    need = resources.use.sum(axis=1) * (1 - SLACK)
    return np.asarray((members @ resources.limit.T < need).any(axis=1))


@dataclass(frozen=True)
class SetCuts:
    """Cuts for M sets of nodes C: the use of a resource in C is at most the limit of C times the entries into C.

    Every placement satisfies them: one that never enters C uses nothing of it, and any other uses at most the limit.
    They exclude relaxed paths that go back and forth inside a set that is too small for the whole chain.

    - `members` (M, N): 0 or 1. `resource` (M,): its index. `limit` (M,).
    - If the resource is `ENTRY`, the use is 1 for every path: C must be entered.
    - If `origin` (M,) is not `ANYWHERE`, only entries from that node count.
    """

    members: FloatArray
    resource: IntArray
    limit: FloatArray
    origin: IntArray

    ENTRY: ClassVar[int] = -1
    ANYWHERE: ClassVar[int] = -1

    @classmethod
    def empty(cls, nodes: int) -> SetCuts:
        """No cuts."""
        return cls.of(np.zeros((0, nodes)), np.zeros(0, dtype=np.intp), np.zeros(0))

    @classmethod
    def of(cls, members: FloatArray, resource: IntArray, limit: FloatArray) -> SetCuts:
        """Cuts that count entries from any node."""
        return cls(members, resource, limit, np.full(len(limit), cls.ANYWHERE))

    @classmethod
    def entry(cls, nodes: int, node: int, origin: int = ANYWHERE) -> SetCuts:
        """The condition that `node` is entered (from `origin`); a branch, which not all placements satisfy."""
        return cls(np.eye(nodes)[[node]], np.array([cls.ENTRY]), np.ones(1), np.array([origin]))

    @property
    def constant_use(self) -> FloatArray:
        """The part of the use that is the same for all placements (M,)."""
        return np.asarray(self.resource == self.ENTRY, dtype=float)

    def __len__(self) -> int:
        return len(self.limit)

    def joined(self, other: SetCuts) -> SetCuts:
        """These cuts, then the other ones."""
        return SetCuts(
            np.vstack((self.members, other.members)),
            np.concatenate((self.resource, other.resource)),
            np.concatenate((self.limit, other.limit)),
            np.concatenate((self.origin, other.origin)),
        )

    def with_limits_of(self, resources: Resources) -> SetCuts:
        """The same cuts with other limits, in the same order.

        A set that need no longer be entered is replaced by the set of all nodes, which every placement enters.
        """
        entry = self.resource == self.ENTRY
        needless = entry & ~_too_small(resources, 1 - self.members)
        members = np.where(needless[:, None], 1, self.members)
        limit = np.where(entry, 1, (members * resources.limit[self.resource]).sum(axis=1))
        return SetCuts(members, self.resource, limit, self.origin)

    def excess(self, support: Support) -> FloatArray:
        """Left side less right side of each cut at `support` (M,)."""
        used = np.where(self.resource == self.ENTRY, 1, (self.members * support.used[self.resource]).sum(axis=1))
        inner = ((self.members @ support.crossings) * self.members).sum(axis=1)
        entered = self.members @ (support.starts + support.crossings.sum(axis=0)) - inner
        named = self.origin != self.ANYWHERE
        entered[named] = (self.members * support.crossings[self.origin])[named].sum(axis=1)
        return np.asarray(used - self.limit * entered)

    def atom_price(self, price: FloatArray, kinds: int) -> FloatArray:
        """Price per unit of each resource on each node (K, N), at multipliers `price` (M,)."""
        total = np.zeros((kinds, self.members.shape[1]))
        uses = self.resource != self.ENTRY
        np.add.at(total, self.resource[uses], (price[:, None] * self.members)[uses])
        return total

    def entry_refund(self, price: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Refunds for entries: per link (N, N), and per node at the start of a path (N,)."""
        named = self.origin != self.ANYWHERE
        refund = np.where(named, 0, price * self.limit)
        starts = refund @ self.members
        on_link = starts - (self.members.T * refund) @ self.members
        np.add.at(on_link, self.origin[named], (price * self.limit)[named, None] * self.members[named])
        return on_link, starts

    @classmethod
    def violated_use_cuts(cls, resources: Resources, support: Support, known: set[bytes], most: int = 12) -> SetCuts:
        """New cuts that `support` violates, the most violated first; sets grow greedily from every node."""
        n = resources.limit.shape[1]
        arrivals = support.starts + support.crossings.sum(axis=0)
        between = support.crossings + support.crossings.T
        found: list[tuple[float, bytes, FloatArray, int]] = []
        # The other resources hardly differ from these once they are summed over sets.
        for kind in (kind for kind, unit in enumerate(resources.unit_bytes) if np.isfinite(unit)):
            limit, used = resources.limit[kind], support.used[kind]
            need = resources.use[kind].sum()
            members, every = np.eye(n), np.arange(n)
            # Of each set: entries, limit, use, and crossings between it and each node.
            entered, held, filled, beside = arrivals, limit, used, between
            for _ in range(min(n - 1, 24)):
                new_entered = entered[:, None] + arrivals - beside
                new_limit = np.minimum(held[:, None] + limit, need)
                excess = filled[:, None] + used - new_limit * new_entered  # (seed, added)
                excess[members > 0] = -np.inf
                added = excess.argmax(axis=1)
                worth, entered = excess[every, added], new_entered[every, added]
                held, filled, beside = held + limit[added], filled + used[added], beside + between[added]
                members[every, added] = 1
                for seed in np.flatnonzero(worth > 1e-3 * max(need, 1e-300)):
                    key = bytes([kind]) + members[seed].astype(np.uint8).tobytes()
                    if key not in known and (members[seed] @ limit) < need:
                        found.append((float(worth[seed]) / need, key, members[seed].copy(), kind))
        found.sort(key=lambda entry: -entry[0])
        chosen: dict[bytes, tuple[FloatArray, int]] = {}
        for _, key, mask, kind in found:
            if len(chosen) < most:
                chosen.setdefault(key, (mask, kind))
        if not chosen:
            return cls.empty(n)
        known.update(chosen)
        masks = np.array([mask for mask, _ in chosen.values()])
        kinds = np.array([kind for _, kind in chosen.values()], dtype=np.intp)
        return cls.of(masks, kinds, (masks * resources.limit[kinds]).sum(axis=1))

    @classmethod
    def violated_entry_cuts(
        cls, resources: Resources, support: Support, known: set[bytes], forbidden: NDArray[np.bool_], most: int = 12
    ) -> SetCuts:
        """New entry cuts that `support` violates, the most violated first.

        Where the nodes outside a set C are too small for the whole chain, C must be entered. `forbidden` (N,) marks
        nodes that may not be used. The nodes outside C are collected greedily, starting from every node.
        """
        n = len(support.starts)
        arrivals = support.starts + support.crossings.sum(axis=0)
        between = support.crossings + support.crossings.T
        limit = np.where(forbidden, 0, resources.limit)
        need = resources.use.sum(axis=1) * (1 - SLACK)
        found: dict[bytes, tuple[float, FloatArray]] = {}
        for kind in range(len(need)):
            inside, outside = 1 - np.eye(n), limit[kind].copy()  # one set C per node that starts outside it
            beside = between.sum(axis=0) - between
            entered = arrivals.sum() - support.crossings.sum() - arrivals + between.sum(axis=1)
            for _ in range(n - 1):
                for row in np.flatnonzero((outside < need[kind]) & (entered < 1 - MIN_ENTRY_DEFICIT)):
                    key = b"entry" + inside[row].astype(np.uint8).tobytes()
                    if key not in known:
                        found[key] = float(entered[row]), inside[row].copy()
                left = entered[:, None] - arrivals + beside
                left[(inside == 0) | (outside[:, None] + limit[kind] >= need[kind])] = np.inf
                taken = left.argmin(axis=1)
                rows = np.flatnonzero(np.isfinite(left[np.arange(n), taken]))
                if not len(rows):
                    break
                taken = taken[rows]
                inside[rows, taken] = 0
                entered[rows], outside[rows] = left[rows, taken], outside[rows] + limit[kind, taken]
                beside[rows] -= between[taken]
        chosen = sorted(found, key=lambda key: found[key][0])[:most]
        known.update(chosen)
        members = np.array([found[key][1] for key in chosen]).reshape(-1, n)
        return cls.of(members, np.full(len(chosen), cls.ENTRY), np.ones(len(chosen)))
