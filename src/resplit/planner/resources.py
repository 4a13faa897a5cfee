"""What placements may use of nodes, and of sets of nodes that they enter: the linear rows of the relaxation.

Knows neither prices nor solvers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["Resources", "SetCuts", "Support"]


@dataclass(frozen=True)
class Resources:
    """What atoms use of nodes: `use` (K, A), `limit` (K, N). The first is memory in units of the mean atom; the others
    are its integer roundings: with any unit d > 0, sum floor(m_a / d) x[a, i] <= floor(M_i / d) holds for integer x.
    `unit_bytes` (K,) are the units."""

    use: FloatArray
    limit: FloatArray
    unit_bytes: FloatArray

    @classmethod
    def of(cls, instance: Instance, most_units: int = 3) -> Resources:
        """Memory, and its roundings by the commonest sizes of atoms."""
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


@dataclass(frozen=True)
class Support:
    """A mixture of placements, summed over boundaries: how often each link is crossed (N, N), how often a path begins
    at each node (N,), how much of each resource each node gives (K, N)."""

    crossed: FloatArray
    begun: FloatArray
    used: FloatArray

    @classmethod
    def of(cls, resources: Resources, nodes_of: IntArray) -> Support:
        """The support of one placement of atoms."""
        n = resources.limit.shape[1]
        crossed, begun = np.zeros((n, n)), np.zeros(n)
        changes = np.flatnonzero(nodes_of[1:] != nodes_of[:-1])
        np.add.at(crossed, (nodes_of[changes], nodes_of[changes + 1]), 1.0)
        begun[nodes_of[0]] = 1.0
        return cls(crossed, begun, np.array([np.bincount(nodes_of, use, n) for use in resources.use]))


@dataclass(frozen=True)
class SetCuts:
    """For sets of nodes C and one resource each: use of the nodes in C <= limit of C x times that the path enters C.

    It holds for every placement (what never enters C uses nothing of it, what enters once or more uses at most the
    limit), and forbids the relaxation to go back and forth inside a set that has too little for the whole chain.
    `members` (M, N) 0 or 1, `resource` (M,) index, `limit` (M,). Where the resource is `ENTRY`, the use is 1 whatever
    the path does: C must be entered.
    """

    members: FloatArray
    resource: IntArray
    limit: FloatArray

    ENTRY: ClassVar[int] = -1

    @classmethod
    def none(cls, nodes: int) -> SetCuts:
        return cls(np.zeros((0, nodes)), np.zeros(0, dtype=np.intp), np.zeros(0))

    @classmethod
    def entry(cls, node: int, nodes: int) -> SetCuts:
        """A node must be entered: not for every placement, but for those that use it."""
        return cls(np.eye(nodes)[[node]], np.array([cls.ENTRY]), np.ones(1))

    @property
    def least(self) -> FloatArray:
        """What is used of C whatever a placement does (M,)."""
        return np.asarray(self.resource == self.ENTRY, dtype=float)

    def __len__(self) -> int:
        return len(self.limit)

    def joined(self, other: SetCuts) -> SetCuts:
        """These and the other's."""
        return SetCuts(
            np.vstack((self.members, other.members)),
            np.concatenate((self.resource, other.resource)),
            np.concatenate((self.limit, other.limit)),
        )

    def excess(self, support: Support) -> FloatArray:
        """Left side less right side at `support` (M,)."""
        used = np.where(self.resource == self.ENTRY, 1, (self.members * support.used[self.resource]).sum(axis=1))
        inner = np.einsum("mi,ij,mj->m", self.members, support.crossed, self.members)
        entered = self.members @ (support.begun + support.crossed.sum(axis=0)) - inner
        return np.asarray(used - self.limit * entered)

    def atom_price(self, price: FloatArray, kinds: int) -> FloatArray:
        """What the cuts at multipliers `price` (M,) ask per unit of each resource on each node (K, N)."""
        total = np.zeros((kinds, self.members.shape[1]))
        uses = self.resource != self.ENTRY
        np.add.at(total, self.resource[uses], (price[:, None] * self.members)[uses])
        return total

    def entry_refund(self, price: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What entering pays back: on a link (N, N), and where a path begins (N,)."""
        refund = price * self.limit
        begun = refund @ self.members
        return begun - (self.members.T * refund) @ self.members, begun

    @classmethod
    def violated(cls, resources: Resources, support: Support, known: set[bytes], most: int = 12) -> SetCuts:
        """New cuts that `support` breaks, the worst first: sets grown greedily from every node."""
        n = resources.limit.shape[1]
        arrivals = support.begun + support.crossed.sum(axis=0)
        between = support.crossed + support.crossed.T
        found: list[tuple[float, bytes, FloatArray, int]] = []
        for kind in range(len(resources.use)):
            limit, used = resources.limit[kind], support.used[kind]
            need = resources.use[kind].sum()
            members = np.eye(n)
            for _ in range(min(n - 1, 24)):
                entered = members @ arrivals - ((members @ support.crossed) * members).sum(axis=1)  # (N,)
                new_entered = entered[:, None] + arrivals - members @ between
                new_limit = np.minimum((members @ limit)[:, None] + limit, need)
                excess = (members @ used)[:, None] + used - new_limit * new_entered  # (seed, added)
                excess[members > 0] = -np.inf
                added = excess.argmax(axis=1)
                worth = excess[np.arange(n), added]
                members = members.copy()
                members[np.arange(n), added] = 1
                for seed in np.flatnonzero(worth > 1e-3 * max(need, 1e-300)):
                    key = bytes([kind]) + members[seed].astype(np.uint8).tobytes()
                    if key not in known and (members[seed] @ limit) < need:
                        found.append((float(worth[seed]) / need, key, members[seed], kind))
        found.sort(key=lambda entry: -entry[0])
        chosen: dict[bytes, tuple[FloatArray, int]] = {}
        for _, key, mask, kind in found:
            if len(chosen) < most:
                chosen.setdefault(key, (mask, kind))
        if not chosen:
            return cls.none(n)
        known.update(chosen)
        masks = np.array([mask for mask, _ in chosen.values()])
        kinds = np.array([kind for _, kind in chosen.values()], dtype=np.intp)
        return cls(masks, kinds, (masks * resources.limit[kinds]).sum(axis=1))
