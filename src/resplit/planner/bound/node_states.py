"""The states of a node: how many atoms of each kind it holds, and the least load and memory that this means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["NodeStates"]

Words = np.ndarray[Any, np.dtype[np.uint64]]

MAX_STATES = 20_000
ALIKE = 1e-9  # relative; atoms whose memory and loads differ by less are of one kind
SEVERAL = 3  # least number of atoms of a kind whose memory can be the unit of coarse states
ROUNDING_UP = 1e-9  # relative; so that exactly the bytes of a state are rounded to that state
ROUNDING = 1e-12  # relative; subtracted from loads and memory, as their sums are in a different order elsewhere


@dataclass(frozen=True)
class NodeStates:
    """The states of nodes, with A atoms of K kinds and L states. A state is a number in mixed radix, so states add up.

    - `kind` (A,): of each atom.
    - `held` (L, K): the number of atoms of each kind.
    - `before` (A + 1,): prefix sums of the atoms' states.
    - `load` (L, N), `memory` (L,): the least that such atoms need; exact if the atoms of each kind are alike.
    - `unit_bytes`: 0, or the unit in which states count memory only (see `coarse`).
    - `packed` (L,): the numbers of a state side by side in the lowest `bits` bits of a word, each below a free bit that
      is set in `guard`. State b holds no more of any kind than state a if (a | guard) - b leaves all bits of `guard`.
    """

    kind: IntArray
    held: IntArray
    before: IntArray
    load: FloatArray
    memory: FloatArray
    unit_bytes: float
    packed: Words
    guard: np.uint64
    bits: int

    @classmethod
    def of(cls, instance: Instance) -> NodeStates:
        """The states of `instance`. Kinds are merged, the most similar first, until there are few enough states."""
        kind = _kinds(instance)
        counts = np.bincount(kind)
        radix = np.concatenate(([1], (counts + 1).cumprod()))
        members = [kind == k for k in range(len(counts))]
        load = np.array(
            [np.where(np.isfinite(instance.load[m]), instance.load[m], np.inf).min(axis=0) for m in members]
        )
        load[~np.isfinite(load)] = 0  # a kind that the node cannot run is never held
        memory = np.array([instance.memory[m].min() for m in members])
        held = np.arange(radix[-1])[:, None] // radix[:-1] % (counts + 1)  # (L, kinds)
        ends = np.array([int(count).bit_length() + 1 for count in counts]).cumsum()  # of each kind's bits
        starts = np.concatenate(([0], ends[:-1])).astype(np.uint64)
        return cls(
            kind=kind,
            held=held,
            before=np.concatenate(([0], radix[kind].cumsum())),
            load=held @ load * (1 - ROUNDING),
            memory=held @ memory * (1 - ROUNDING),
            unit_bytes=0.0,
            packed=np.bitwise_or.reduce(held.astype(np.uint64) << starts, axis=1),
            guard=np.bitwise_or.reduce(np.uint64(1) << (ends - 1).astype(np.uint64)),
            bits=int(ends[-1]),
        )

    def coarse(self, instance: Instance) -> NodeStates:
        """Fewer states, which count memory only, in units of the smallest kind with several atoms.

        The load of such a state is the least of all states of as much memory. The states stay as they are if only one
        kind has several atoms, and if kinds were merged, as their memory is then underestimated.
        """
        alone = self.held.sum(axis=1) == 1
        several = self.held.max(axis=0) >= SEVERAL
        unit_bytes = float(self.memory[alone & (self.held @ several == 1)].min(initial=np.inf))
        merged = float(self.memory.max()) < float(instance.memory.sum()) * (1 - ALIKE)
        if merged or several.sum() < 2 or not 0 < unit_bytes < np.inf:
            return self
        units = np.floor(self.memory / unit_bytes * (1 + ROUNDING_UP)).astype(np.intp)
        load = np.full((units.max() + 1, self.load.shape[1]), np.inf)
        np.minimum.at(load, units, self.load)
        number = np.arange(len(load), dtype=float)
        bits = len(load).bit_length() + 1
        return replace(
            self,
            load=np.minimum.accumulate(load[::-1])[::-1],
            memory=number * unit_bytes * (1 - 2 * ROUNDING_UP),
            unit_bytes=unit_bytes,
            packed=number.astype(np.uint64),
            guard=np.uint64(1 << (bits - 1)),
            bits=bits,
        )

    def after(self, state: int, p: int, q: int, held_bytes: float) -> int:
        """The state after `state` and atoms p..q-1, on a node that then holds `held_bytes`."""
        if self.unit_bytes:
            return int(held_bytes / self.unit_bytes * (1 + ROUNDING_UP))
        return int(state + self.before[q] - self.before[p])


def _kinds(instance: Instance) -> IntArray:
    """The kind of each atom (A,). Atoms of a kind are alike in memory, and in load on each node where both run."""
    kind = np.full(instance.shape[0], -1)
    firsts: list[int] = []
    for atom in range(len(kind)):
        same = [k for k, first in enumerate(firsts) if _alike(instance, atom, first)]
        kind[atom] = same[0] if same else len(firsts)
        firsts += [] if same else [atom]
    while np.prod(np.bincount(kind) + 1.0) > MAX_STATES:
        kind = _merged(instance, kind)
    return kind


def _alike(instance: Instance, atom: int, other: int) -> bool:
    mine, theirs = instance.load[atom], instance.load[other]
    both = np.isfinite(mine) & np.isfinite(theirs)
    close = abs(instance.memory[atom] - instance.memory[other]) <= ALIKE * instance.memory[other]
    return bool(close and np.allclose(mine[both], theirs[both], rtol=ALIKE, atol=0))


def _merged(instance: Instance, kind: IntArray) -> IntArray:
    """`kind` after merging the two kinds whose memory is most similar."""
    size = np.array([instance.memory[kind == k].mean() for k in range(kind.max() + 1)])
    order = np.argsort(size, kind="stable")
    at = int(np.diff(size[order]).argmin())
    merged = np.where(kind == order[at + 1], order[at], kind)
    return np.unique(merged, return_inverse=True)[1].astype(np.intp)
