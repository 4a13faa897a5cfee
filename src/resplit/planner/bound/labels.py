"""Label setting for the pricing of ng-route paths.

A label is a partial path with a boundary, a node, and the states of earlier nodes that the neighbourhoods keep. The
code is compiled with numba at the first import on a machine and cached on disk. `ng_paths` prepares its arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, typeof

from resplit.planner.bound.node_states import ROUNDING_UP
from resplit.planner.budget import Budget
from resplit.planner.kernels import kernel
from resplit.types import FloatArray

__all__ = ["MAX_SLOTS", "ChainArrays", "LabelPool", "PricingArrays", "cheapest_path"]

MAX_SLOTS = 64  # nodes whose state labels can hold; the bits of a mask
CHUNK = 10_000  # labels extended between two readings of the clock, about 10 ms
MAX_RIVALS = 2_000  # cheaper labels with which one label is compared

Words = np.ndarray[Any, np.dtype[np.uint64]]
States = np.ndarray[Any, np.dtype[np.uint16]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


class ChainArrays(NamedTuple):
    """The arrays that do not depend on prices, with A atoms, N nodes, T slots and L node states.

    A slot belongs to a node whose state labels may hold.

    - `end` (A, N): the last boundary of a feasible interval that begins at an atom.
    - `load` (A + 1, N), `memory` (A + 1,): prefix sums.
    - `least_load` (A + 2, N), `least_memory` (A + 2,): of any single later atom.
    - `free`, `headroom`, `memory_limit`, `queue_weight` (N,).
    - `slot` (N,): the slot of each node, or -1.
    - `state` (A + 1,): prefix sums of node states if `unit_bytes` is 0; otherwise a state counts units of memory.
    - `state_load` (T, L), `state_memory` (L,): of each state. State L - 1 stands for a full node.
    - `packed` (L,), `guard`, `bits`: for the comparison of states (see `NodeStates`).
    """

    end: Indices
    load: FloatArray
    memory: FloatArray
    least_load: FloatArray
    least_memory: FloatArray
    free: FloatArray
    headroom: FloatArray
    memory_limit: FloatArray
    queue_weight: FloatArray
    hop_of: Indices
    slot: Indices
    state: Indices
    unit_bytes: float
    state_load: FloatArray
    state_memory: FloatArray
    packed: Words
    guard: np.uint64
    bits: int


class PricingArrays(NamedTuple):
    """The arrays that depend on prices.

    - `share` (N,): of the queueing cost.
    - `atom` (A + 1, N): prefix sums of the atoms' costs.
    - `start`, `finish` (N,), `hops` (kinds, N, N): transfer costs.
    - `enter_below`, `leave_below` (A + 1, N): labels of at least this cost are dropped when they enter or leave.
    - `keep` (A + 1, N): a bit mask of the slots that are kept when node i is entered at boundary b.
    """

    share: FloatArray
    atom: FloatArray
    start: FloatArray
    finish: FloatArray
    hops: FloatArray
    enter_below: FloatArray
    leave_below: FloatArray
    keep: Words


class LabelPool(NamedTuple):
    """The labels of one pricing.

    - `stage`: 2 b if the label enters `node` at boundary b, 2 b + 1 if it leaves the node there.
    - `state` (labels, T): the node states on the slots in `mask`; `key` is a hash of them.
    - `next_label`: links the labels of a stage, beginning at `head` (2 A + 2,).
    - `table`: a hash table of labels with open addressing; its size is a power of 2.
    """

    cost: FloatArray
    parent: Indices
    node: Indices
    stage: Indices
    key: Words
    mask: Words
    state: States
    next_label: Indices
    head: Indices
    table: Indices

    @classmethod
    def of(cls, labels: int, slots: int, atoms: int) -> LabelPool:
        """An empty pool for `labels` labels."""
        return cls(
            cost=np.empty(labels),
            parent=np.empty(labels, np.int64),
            node=np.empty(labels, np.int64),
            stage=np.empty(labels, np.int64),
            key=np.empty(labels, np.uint64),
            mask=np.empty(labels, np.uint64),
            state=np.empty((labels, max(slots, 1)), np.uint16),
            next_label=np.empty(labels, np.int64),
            head=np.full(2 * atoms + 2, -1),
            table=np.full(1 << (2 * labels - 1).bit_length(), -1),
        )


_ONE = np.uint64(1)
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HASH_WEIGHTS = np.random.default_rng(0).integers(1, 2**63, MAX_SLOTS, dtype=np.uint64) * np.uint64(2) + _ONE


@njit(inline="always")
def _same(pool, label, source, mask, slot, state):  # type: ignore[no-untyped-def]
    """Whether `label` has on `mask` the states of `source`, except for `state` on `slot`."""
    bit = 0
    while mask != 0:
        if mask & _ONE:
            wanted = state if bit == slot else np.int64(pool.state[source, bit])
            if np.int64(pool.state[label, bit]) != wanted:
                return False
        mask >>= _ONE
        bit += 1
    return True


@njit(inline="always")
def _add(pool, count, stage, node, cost, source, mask, key, slot, state):  # type: ignore[no-untyped-def]
    """Add a label that extends `source`, or lower the cost of an equal label.

    Returns the number of labels, or -1 if the pool is full.
    """
    last = np.uint64(len(pool.table) - 1)
    at = (key + np.uint64(stage) * np.uint64(0x632BE59BD9B4E019) + np.uint64(node)) * _HASH_MULTIPLIER
    at = (at >> np.uint64(20)) & last
    while pool.table[at] >= 0:
        other = pool.table[at]
        alike = pool.stage[other] == stage and pool.node[other] == node and pool.mask[other] == mask
        if alike and pool.key[other] == key and _same(pool, other, source, mask, slot, state):
            if cost < pool.cost[other]:
                pool.cost[other] = cost
                pool.parent[other] = source
            return count
        at = (at + _ONE) & last
    if count == len(pool.cost):
        return -1
    pool.table[at] = count
    pool.cost[count], pool.parent[count], pool.node[count], pool.stage[count] = cost, source, node, stage
    pool.key[count], pool.mask[count] = key, mask
    bit = 0
    while mask != 0:
        if mask & _ONE:
            pool.state[count, bit] = state if bit == slot else pool.state[source, bit]
        mask >>= _ONE
        bit += 1
    pool.next_label[count] = pool.head[stage]
    pool.head[stage] = count
    return count + 1


@njit(inline="always")
def _packed(chain, pool, labels):  # type: ignore[no-untyped-def]
    """The states of labels, packed into words of several slots (labels, words)."""
    each = 64 // chain.bits
    packed = np.zeros((len(labels), (pool.state.shape[1] + each - 1) // each), np.uint64)
    for at in range(len(labels)):
        mask, slot = pool.mask[labels[at]], 0
        while mask != 0:
            if mask & _ONE:
                state = chain.packed[pool.state[labels[at], slot]]
                packed[at, slot // each] |= state << np.uint64(slot % each * chain.bits)
            mask >>= _ONE
            slot += 1
    return packed


@njit(inline="always")
def _dominated(packed, rivals, guard):  # type: ignore[no-untyped-def]
    """Whether the states of one of `rivals` (rivals, words) hold no more of any kind than `packed` (words,)."""
    for rival in range(len(rivals)):
        word = 0
        while word < len(packed) and ((packed[word] | guard) - rivals[rival, word]) & guard == guard:
            word += 1
        if word == len(packed):
            return True
    return False


@njit(inline="always")
def _guards(chain):  # type: ignore[no-untyped-def]
    """A word with the guard of a state in each slot."""
    guard = np.uint64(0)
    for at in range(64 // chain.bits):
        guard |= chain.guard << np.uint64(at * chain.bits)
    return guard


@njit(inline="always")
def _remove_dominated(chain, pool, stage):  # type: ignore[no-untyped-def]
    """Unlink the dominated labels of `stage`.

    A label is dominated by a cheaper one on the same node whose states hold no more of any kind: each extension of the
    cheaper label costs no more.
    """
    size, label = 0, pool.head[stage]
    while label >= 0:
        size, label = size + 1, pool.next_label[label]
    labels, label = np.empty(size, np.int64), pool.head[stage]
    begin = np.zeros(len(chain.free) + 1, np.int64)
    for at in range(size):
        labels[at], label = label, pool.next_label[label]
        begin[pool.node[labels[at]] + 1] += 1
    begin = begin.cumsum()
    end, guard, packed = begin.copy(), _guards(chain), _packed(chain, pool, labels)
    kept, pool.head[stage] = np.empty_like(packed), -1
    for at in np.argsort(pool.cost[labels], kind="mergesort"):
        label = labels[at]
        node = pool.node[label]
        rivals = kept[begin[node] : min(end[node], begin[node] + MAX_RIVALS)]  # the cheapest kept so far
        if not _dominated(packed[at], rivals, guard):
            kept[end[node]] = packed[at]
            end[node] += 1
            pool.next_label[label] = pool.head[stage]
            pool.head[stage] = label


@njit(inline="always")
def _extend_to_nodes(chain, prices, pool, count, label, boundary):  # type: ignore[no-untyped-def]
    """Extend a label that leaves its node at `boundary` to all other nodes, which keep only their neighbourhoods."""
    here, mask = pool.node[label], pool.mask[label]
    kind = chain.hop_of[boundary]
    for there in range(len(chain.free)):
        cost = pool.cost[label] + prices.hops[kind, here, there]
        if there == here or not cost < prices.enter_below[boundary, there]:
            continue
        slot = chain.slot[there]
        if slot >= 0 and (mask >> np.uint64(slot)) & _ONE:
            held = chain.state_memory[pool.state[label, slot]]
            if held + chain.memory[boundary + 1] - chain.memory[boundary] > chain.memory_limit[there]:
                continue
        kept = mask & prices.keep[boundary, there]
        key, gone, bit = pool.key[label], mask & ~kept, 0
        while gone != 0:
            if gone & _ONE:
                key -= np.uint64(pool.state[label, bit]) * _HASH_WEIGHTS[bit]
            gone >>= _ONE
            bit += 1
        count = _add(pool, count, 2 * boundary, there, cost, label, kept, key, -1, 0)
        if count < 0:
            break
    return count


@njit(inline="always")
def _extend_on_node(chain, prices, pool, count, label, boundary):  # type: ignore[no-untyped-def]
    """Extend a label by all intervals from `boundary` on its node; a known state of the node raises their cost."""
    node = pool.node[label]
    slot, full, held = chain.slot[node], np.int64(len(chain.state_memory) - 1), np.int64(0)
    if slot >= 0 and (pool.mask[label] >> np.uint64(slot)) & _ONE:
        held = np.int64(pool.state[label, slot])
    load, memory = 0.0, 0.0
    if held > 0:
        load, memory = chain.state_load[slot, held], chain.state_memory[held]
    free, weight, atoms = chain.free[node], chain.queue_weight[node], len(chain.hop_of)
    paid = weight * load / (free - load)
    for end in range(boundary + 1, chain.end[boundary, node] + 1):
        filled = memory + chain.memory[end] - chain.memory[boundary]
        busy = load + chain.load[end, node] - chain.load[boundary, node]
        if filled > chain.memory_limit[node] or busy > chain.headroom[node]:
            break
        queue = prices.share[node] * (weight * busy / (free - busy) - paid)
        cost = pool.cost[label] + queue + prices.atom[end, node] - prices.atom[boundary, node]
        if not cost < prices.leave_below[end, node]:
            continue
        if end == atoms:  # no later interval depends on states
            count = _add(pool, count, 2 * end + 1, node, cost, label, np.uint64(0), np.uint64(0), -1, 0)
        else:
            key, mask, state = pool.key[label], pool.mask[label], np.int64(0)
            if slot >= 0:
                state = held + chain.state[end] - chain.state[boundary]
                if chain.unit_bytes > 0.0:
                    state = np.int64(filled / chain.unit_bytes * (1.0 + ROUNDING_UP))
                if (
                    chain.state_memory[state] + chain.least_memory[end + 1] > chain.memory_limit[node]
                    or chain.state_load[slot, state] + chain.least_load[end + 1, node] > chain.headroom[node]
                ):
                    state = full
                key += (np.uint64(state) - np.uint64(held)) * _HASH_WEIGHTS[slot]
                bit = _ONE << np.uint64(slot)
                mask = mask | bit if state > 0 else mask & ~bit
            count = _add(pool, count, 2 * end + 1, node, cost, label, mask, key, slot, state)
        if count < 0:
            break
    return count


@kernel()
def _path(pool, label, atoms):  # type: ignore[no-untyped-def]
    nodes_of = np.full(atoms, -1, np.int64)
    end = atoms
    while label >= 0:
        begin = pool.stage[label] // 2
        nodes_of[begin:end] = pool.node[label]
        end, label = begin, pool.parent[label]
    return nodes_of


def _example() -> tuple[ChainArrays, PricingArrays, LabelPool]:
    """Arrays whose types define the signatures of the compiled functions."""
    line, plane, cube = np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1, 1))
    whole, wholes = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
    words = np.zeros((1, 1), np.uint64)
    limits = line, line, line, line, whole, whole, whole
    packing = words[0], np.uint64(0), 1
    chain = ChainArrays(wholes, plane, line, plane, line, *limits, 0.0, plane, line, *packing)
    prices = PricingArrays(line, plane, line, line, cube, plane, plane, words)
    return chain, prices, LabelPool.of(1, 1, 1)


_TYPES = tuple(map(typeof, _example()))
_PROGRESS, _COUNT = map(typeof, (np.zeros(3, np.int64), 0))


@kernel([_TYPES])
def _start(chain, prices, pool):  # type: ignore[no-untyped-def]
    """Add the labels that enter a node before the first atom. Returns their number, or -1 if the pool is full."""
    count = 0
    for node in range(len(chain.free)):
        if count >= 0 and prices.start[node] < prices.enter_below[0, node]:
            count = _add(pool, count, 0, node, prices.start[node], -1, np.uint64(0), np.uint64(0), -1, 0)
    return count


@kernel([(*_TYPES, _PROGRESS, _COUNT)])
def _extend(chain, prices, pool, progress, most):  # type: ignore[no-untyped-def]
    """Extend at most `most` labels, boundary by boundary: first the leaving labels, then the entering ones.

    `progress` holds the number of labels (-1 if the pool is full), the turn (2 b or 2 b + 1), and the next label of
    that turn or -1. Returns False if no label is left to extend.
    """
    count, turn, label = progress
    for _ in range(most):
        while label < 0 and turn < 2 * len(chain.hop_of):
            turn += 1
            _remove_dominated(chain, pool, turn ^ 1)
            label = pool.head[turn ^ 1]
        if count < 0 or turn >= 2 * len(chain.hop_of):
            break
        if turn & 1:
            count = _extend_on_node(chain, prices, pool, count, label, turn >> 1)
        else:
            count = _extend_to_nodes(chain, prices, pool, count, label, turn >> 1)
        label = pool.next_label[label]
    progress[0], progress[1], progress[2] = count, turn, label
    return count >= 0 and turn < 2 * len(chain.hop_of)


@kernel([_TYPES])
def _cheapest(chain, prices, pool):  # type: ignore[no-untyped-def]
    """Cost and nodes (A,) of the cheapest complete path."""
    atoms = len(chain.hop_of)
    best, last = np.inf, -1
    label = pool.head[2 * atoms + 1]
    while label >= 0:
        cost = pool.cost[label] + prices.finish[pool.node[label]]
        if cost < best:
            best, last = cost, label
        label = pool.next_label[label]
    return best, _path(pool, last, atoms)


def cheapest_path(
    chain: ChainArrays, prices: PricingArrays, pool: LabelPool, budget: Budget
) -> tuple[int, float, Indices]:
    """The number of labels, the cost and the nodes (A,) of the cheapest path below the cutoffs in `prices`.

    The cost is inf if there is no such path. The number of labels is -1 if `pool`, which must be empty, or the time of
    `budget` did not suffice.
    """
    progress = np.array([_start(chain, prices, pool), -1, -1])
    while _extend(chain, prices, pool, progress, CHUNK):
        if budget.left_s <= 0:
            progress[0] = -1
            break
    if progress[0] < 0:
        return -1, np.inf, np.empty(0, np.int64)
    cost, nodes_of = _cheapest(chain, prices, pool)
    return int(progress[0]), cost, nodes_of
