"""Random moves on a placement, accepted or not as in simulated annealing.

Compiled with numba, once, at the first import, and kept on disk. Knows no schedule (see `anneal`) and no bounds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, typeof

from resplit.planner.instance import Instance
from resplit.types import FloatArray

__all__ = ["BROKEN", "Tables", "penalised_cost", "walk"]

BROKEN = 3  # kinds of broken limits: memory over (bytes), load over, links and blocks that are missing (count)
NEAR = 12  # nodes that are cheap to go to, by node
EVERY = 256  # steps between two changes of the penalties
MOSTLY_BROKEN, MOSTLY_LEGAL = 0.75, 0.25  # share of the steps on placements that break a limit
HARDER, SOFTER = 1.1, 0.95
LEAST_PENALTY, MOST_PENALTY = 0.02, 50.0  # of what it was at first

Indices = np.ndarray[Any, np.dtype[np.int64]]
State = np.ndarray[Any, np.dtype[np.uint64]]


class Tables(NamedTuple):
    """The arrays of an `Instance`, with `near` (N, K): the nodes that are cheapest to go to from each node, and `peak`:
    the highest background."""

    load: FloatArray
    fixed: FloatArray
    memory: FloatArray
    memory_limit: FloatArray
    start: FloatArray
    end: FloatArray
    hops: FloatArray
    hop_of: Indices
    background: FloatArray
    headroom: FloatArray
    near: Indices
    queue_weight: float
    balance_weight: float
    peak: float

    @classmethod
    def of(cls, instance: Instance) -> Tables:
        """The arrays of `instance`, contiguous."""
        nodes = instance.shape[1]
        onward = instance.hops[0] + np.median(instance.alone_cost(), axis=0)
        near = np.argsort(onward, axis=1, kind="stable")[:, : max(1, min(NEAR, nodes - 1))]
        return cls(
            np.ascontiguousarray(instance.load), np.ascontiguousarray(instance.fixed), instance.memory,
            instance.memory_limit, instance.start, instance.end, np.array(instance.hops),
            instance.hop_of.astype(np.int64), instance.background, instance.headroom,
            np.ascontiguousarray(near, np.int64), float(instance.queue_weight), float(instance.balance_weight),
            float(instance.background.max()),
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _bits(random):  # type: ignore[no-untyped-def]
    """64 random bits (xorshift64*)."""
    x = random[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    random[0] = x
    return x * np.uint64(2685821657736338717)


@njit(cache=True, nogil=True)
def _below(random, n):  # type: ignore[no-untyped-def]
    """A random whole number from 0 to n - 1."""
    return np.int64(((_bits(random) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _share(random):  # type: ignore[no-untyped-def]
    """A random number from 0 to 1."""
    return np.float64(_bits(random) >> np.uint64(11)) * (1.0 / (1 << 53))


@njit(cache=True, nogil=True, error_model="numpy")
def _path_cost(x, tables, load, memory):  # type: ignore[no-untyped-def]
    """Transfers and privacy of a placement and how many links and blocks are missing; fills in what nodes hold."""
    node = x[0]
    cost, missing = 0.0, 0.0
    if tables.start[node] < np.inf:
        cost = tables.start[node]
    else:
        missing += 1.0
    for atom in range(len(x)):
        there = x[atom]
        if there != node:
            hop = tables.hops[tables.hop_of[atom], node, there]
            if hop < np.inf:
                cost += hop
            else:
                missing += 1.0
            node = there
        if tables.load[atom, node] < np.inf:
            load[node] += tables.load[atom, node]
        else:
            missing += 1.0
        cost += tables.fixed[atom, node]
        memory[node] += tables.memory[atom]
    if tables.end[node] < np.inf:
        cost += tables.end[node]
    else:
        missing += 1.0
    return cost, missing


@njit(cache=True, nogil=True, error_model="numpy")
def _priced(x, tables, penalty, load, memory, broken):  # type: ignore[no-untyped-def]
    """`penalised_cost` with room for the nodes' `load` and `memory` (N,), all 0 before and after."""
    cost, broken[2] = _path_cost(x, tables, load, memory)
    broken[0] = broken[1] = 0.0
    peak = tables.peak
    for node in x:
        busy = load[node]
        if busy < 0.0:  # this node is done
            continue
        broken[0] += max(memory[node] - tables.memory_limit[node], 0.0)
        if busy > tables.headroom[node]:
            broken[1] += busy - tables.headroom[node]
            busy = max(tables.headroom[node], 0.0)
        cost += tables.queue_weight * busy / (1.0 - tables.background[node] - busy)
        peak = max(peak, tables.background[node] + busy)
        load[node], memory[node] = -1.0, 0.0
    for node in x:
        load[node] = 0.0
    for kind in range(BROKEN):
        cost += penalty[kind] * broken[kind]
    return cost + tables.balance_weight * peak


@njit(cache=True, nogil=True)
def _any_node(x, begin, end, near_nodes, random):  # type: ignore[no-untyped-def]
    """A node for atoms begin..end-1: any at all, or as often one that is cheap to reach from the atom beside them."""
    nodes, count = near_nodes.shape
    if (begin == 0 and end == len(x)) or _below(random, 2):
        return _below(random, nodes)
    before = begin > 0 and (end == len(x) or _below(random, 2) == 0)
    return near_nodes[x[begin - 1] if before else x[end], _below(random, count)]


@njit(cache=True, nogil=True)
def _segment(x, atom):  # type: ignore[no-untyped-def]
    """First atom and end of the segment around `atom`."""
    begin, end = atom, atom + 1
    while begin > 0 and x[begin - 1] == x[atom]:
        begin -= 1
    while end < len(x) and x[end] == x[atom]:
        end += 1
    return begin, end


@njit(cache=True, nogil=True)
def _put(y, begin, end, node):  # type: ignore[no-untyped-def]
    """Atoms begin..end-1 on `node`; a plain loop, as slices compile ten times as slowly."""
    for atom in range(max(begin, 0), min(end, len(y))):
        y[atom] = node


@njit(cache=True, nogil=True)
def _copy(y, at, x, begin, end):  # type: ignore[no-untyped-def]
    """x[begin:end] to y[at:]."""
    for atom in range(begin, end):
        y[at + atom - begin] = x[atom]


@njit(cache=True, nogil=True)
def _interval_moved(x, y, near, random):  # type: ignore[no-untyped-def]
    """Any interval, more often a short one, goes to another node."""
    begin = _below(random, len(x))
    end = begin + 1 + _below(random, 1 + _below(random, len(x) - begin))
    _put(y, begin, end, _any_node(x, begin, end, near, random))
    return True


@njit(cache=True, nogil=True)
def _segment_moved(x, y, near, random):  # type: ignore[no-untyped-def]
    """A whole segment goes to another node."""
    begin, end = _segment(x, _below(random, len(x)))
    _put(y, begin, end, _any_node(x, begin, end, near, random))
    return True


@njit(cache=True, nogil=True)
def _boundary_moved(x, y, random):  # type: ignore[no-untyped-def]
    """A boundary between two segments goes to and fro, mostly by one atom."""
    begin, end = _segment(x, _below(random, len(x)))
    width = 1 if _below(random, 4) else 1 + _below(random, 4)
    if _below(random, 2):
        if end == len(x):
            return False
        _put(y, end, end + width, x[begin])
        return True
    if begin == 0:
        return False
    _put(y, begin - width, begin, x[begin])
    return True


@njit(cache=True, nogil=True)
def _atom_taken(x, y, near, random):  # type: ignore[no-untyped-def]
    """One node gives up an atom, another takes one in, and every boundary between them shifts; now and then the place
    goes to a node from outside."""
    gives, takes = _below(random, len(x)), _below(random, len(x))
    if gives < takes:
        _copy(y, gives, x, gives + 1, takes + 1)
    else:
        _copy(y, takes + 1, x, takes, gives)
    if _below(random, 4) == 0:
        y[takes] = _any_node(x, takes, takes + 1, near, random)
    return gives != takes


@njit(cache=True, nogil=True)
def _nodes_swapped(x, y, nodes, random):  # type: ignore[no-untyped-def]
    """Two nodes change places everywhere."""
    one = x[_below(random, len(x))]
    other = x[_below(random, len(x))] if _below(random, 2) else _below(random, nodes)
    for atom in range(len(x)):
        if x[atom] == one:
            y[atom] = other
        elif x[atom] == other:
            y[atom] = one
    return one != other


@njit(cache=True, nogil=True)
def _order_changed(x, y, random):  # type: ignore[no-untyped-def]
    """A run of segments turns round, or changes places with the run that follows."""
    begin = _segment(x, _below(random, len(x)))[0]
    middle = _segment(x, begin + _below(random, len(x) - begin))[1]
    if _below(random, 2):
        for atom in range(begin, middle):
            y[begin + middle - 1 - atom] = x[atom]
        return True
    if middle == len(x):
        return False
    end = _segment(x, middle + _below(random, len(x) - middle))[1]
    _copy(y, begin, x, middle, end)
    _copy(y, begin + end - middle, x, begin, middle)
    return True


@njit(cache=True, nogil=True)
def _segment_dissolved(x, y, random):  # type: ignore[no-untyped-def]
    """The neighbours of a segment take it over."""
    begin, end = _segment(x, _below(random, len(x)))
    if begin == 0 and end == len(x):
        return False
    middle = begin + _below(random, end - begin + 1)
    if begin == 0 or end == len(x):
        middle = begin if begin == 0 else end
    if begin > 0:
        _put(y, begin, middle, x[begin - 1])
    if end < len(x):
        _put(y, middle, end, x[end])
    return True


@njit(cache=True, nogil=True)
def _neighbour(x, y, near, random):  # type: ignore[no-untyped-def]
    """Makes `y` a random neighbour of `x`; False where the move drawn leads nowhere."""
    _copy(y, 0, x, 0, len(x))
    kind = _below(random, 8)
    if kind == 0:
        return _interval_moved(x, y, near, random)
    if kind == 1:
        return _segment_moved(x, y, near, random)
    if kind == 2:
        return _boundary_moved(x, y, random)
    if kind == 3:
        return _atom_taken(x, y, near, random)
    if kind == 4:
        return _nodes_swapped(x, y, len(near), random)
    if kind == 5:
        return _segment_dissolved(x, y, random)
    return _order_changed(x, y, random)


@njit(cache=True, nogil=True)
def _adapted(penalty, first, share_broken):  # type: ignore[no-untyped-def]
    """Makes breaking limits dearer where most steps do, cheaper where few do."""
    factor = HARDER if share_broken > MOSTLY_BROKEN else SOFTER if share_broken < MOSTLY_LEGAL else 1.0
    for kind in range(len(penalty)):
        penalty[kind] = min(max(penalty[kind] * factor, first[kind] * LEAST_PENALTY), first[kind] * MOST_PENALTY)


def _example() -> tuple[Tables, FloatArray, FloatArray, Indices, float, int, State]:
    """Arrays of the right types, from which the signatures are made."""
    line, plane, whole = np.zeros(1), np.zeros((1, 1)), np.zeros(1, np.int64)
    tables = Tables(
        plane, plane, line, line, line, line, np.zeros((1, 1, 1)), whole, line, line, np.zeros((1, 1), np.int64),
        0.0, 0.0, 0.0,
    )  # fmt: skip
    return tables, line, line, whole, 0.0, 0, np.zeros(1, np.uint64)


_TABLES, _LINE, _, _WHOLE, _NUMBER, _COUNT, _STATE = map(typeof, _example())


@njit([(_WHOLE, _TABLES, _LINE, _LINE)], cache=True, nogil=True)
def penalised_cost(x, tables, penalty, broken):  # type: ignore[no-untyped-def]
    """Objective of a placement `x` (A,) with `penalty` per unit of each kind of broken limit; fills `broken` with how
    much is broken. Links and blocks that are missing cost nothing else, loads above a ceiling what they cost there."""
    nodes = tables.load.shape[1]
    return _priced(x, tables, penalty, np.zeros(nodes), np.zeros(nodes), broken)


@njit([(_WHOLE, _WHOLE, _NUMBER, _TABLES, _LINE, _LINE, _NUMBER, _NUMBER, _COUNT, _STATE)], cache=True, nogil=True)
def walk(x, best, best_cost, tables, penalty, first_penalty, hot, cold, steps, random):  # type: ignore[no-untyped-def]
    """`steps` random moves from `x`, which ends where the walk does, the temperature falling from `hot` to `cold`
    (units of the objective). `penalty` adapts on the way. Returns the cost of the cheapest legal placement met below
    `best_cost`, which is then in `best`, or `best_cost`."""
    nodes = tables.load.shape[1]
    load, memory, broken = np.zeros(nodes), np.zeros(nodes), np.zeros(BROKEN)
    here, there = x.copy(), x.copy()
    cost = _priced(here, tables, penalty, load, memory, broken)
    legal = broken[0] + broken[1] + broken[2] == 0.0
    if legal and cost < best_cost:
        best_cost = cost
        _copy(best, 0, here, 0, len(x))
    temperature, cooling = hot, (cold / hot) ** (EVERY / steps)
    broken_steps = 0
    for step in range(1, steps + 1):
        if _neighbour(here, there, tables.near, random):
            new_cost = _priced(there, tables, penalty, load, memory, broken)
            if new_cost <= cost or _share(random) < np.exp((cost - new_cost) / temperature):
                here, there, cost = there, here, new_cost
                legal = broken[0] + broken[1] + broken[2] == 0.0
                if legal and cost < best_cost:
                    best_cost = cost
                    _copy(best, 0, here, 0, len(x))
        broken_steps += not legal
        if step % EVERY == 0:
            temperature *= cooling
            _adapted(penalty, first_penalty, broken_steps / EVERY)
            cost = _priced(here, tables, penalty, load, memory, broken)
            broken_steps = 0
    _copy(x, 0, here, 0, len(x))
    return best_cost
