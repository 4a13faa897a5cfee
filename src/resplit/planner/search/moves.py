"""Random moves on a placement, accepted or rejected as in simulated annealing.

The code is compiled with numba at the first import on a machine and cached on disk. It must stay in one file: numba
recompiles a function if its own file has changed, but not if the file of a function that it calls has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import typeof

from resplit.planner.kernels import kernel
from resplit.planner.search.kernel_arrays import KernelArrays
from resplit.types import FloatArray

__all__ = ["LIMIT_KINDS", "penalised_cost", "walk"]

LIMIT_KINDS = 3  # memory above a limit (bytes), load above a ceiling, missing links and times (count)
# The columns of `sums`, with a row for each node: its load, memory and atoms, their cost, whether they violate a limit,
# and whether the last move changed the node.
LOAD, MEMORY, ATOMS, COST, BROKEN, TOUCHED = range(6)
COLUMNS = 6
MOVE_WEIGHTS = (2, 2, 1, 2, 1, 1, 1, 1, 1, 2)  # frequency of each move, in the order of `_random_neighbour`
ROUNDING = 1e-12  # error of sums after many moves
ADAPT_EVERY = 256  # steps between two changes of the penalties
HIGH_BROKEN_SHARE, LOW_BROKEN_SHARE = 0.75, 0.25  # share of the steps on placements that violate a limit
PENALTY_INCREASE, PENALTY_DECREASE = 1.1, 0.95
MIN_PENALTY, MAX_PENALTY = 0.02, 50.0  # relative to its first value

Indices = np.ndarray[Any, np.dtype[np.int64]]
State = np.ndarray[Any, np.dtype[np.uint64]]

_MOVE_TABLE = np.repeat(np.arange(len(MOVE_WEIGHTS)), MOVE_WEIGHTS)


@kernel()
def _bits(random):  # type: ignore[no-untyped-def]
    """64 random bits (xorshift64*)."""
    x = random[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    random[0] = x
    return x * np.uint64(2685821657736338717)


@kernel()
def _below(random, n):  # type: ignore[no-untyped-def]
    """A random integer from 0 to n - 1."""
    return np.int64(((_bits(random) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))


@kernel()
def _share(random):  # type: ignore[no-untyped-def]
    """A random number in [0, 1)."""
    return np.float64(_bits(random) >> np.uint64(11)) * (1.0 / (1 << 53))


@kernel()
def _random_node(x, begin, end, nearest, random):  # type: ignore[no-untyped-def]
    """A node for atoms begin..end-1: half of the time any node, else one of the nearest to an adjacent atom's node."""
    nodes, count = nearest.shape
    if (begin == 0 and end == len(x)) or _below(random, 2):
        return _below(random, nodes)
    before = begin > 0 and (end == len(x) or _below(random, 2) == 0)
    return nearest[x[begin - 1] if before else x[end], _below(random, count)]


@kernel()
def _segment(x, atom):  # type: ignore[no-untyped-def]
    """First atom and end of the segment around `atom`."""
    begin, end = atom, atom + 1
    while begin > 0 and x[begin - 1] == x[atom]:
        begin -= 1
    while end < len(x) and x[end] == x[atom]:
        end += 1
    return begin, end


@kernel()
def _fill(y, begin, end, node):  # type: ignore[no-untyped-def]
    """Put atoms begin..end-1 on `node`. A plain loop, as slices take ten times as long to compile."""
    for atom in range(begin, end):
        y[atom] = node


@kernel()
def _copy(y, at, x, begin, end):  # type: ignore[no-untyped-def]
    """Copy x[begin:end] to y[at:]."""
    for atom in range(begin, end):
        y[at + atom - begin] = x[atom]


@kernel()
def _reverse(y, x, begin, end):  # type: ignore[no-untyped-def]
    """Copy x[begin:end] to the same place in y, in reverse order."""
    for atom in range(begin, end):
        y[begin + end - 1 - atom] = x[atom]


@kernel()
def _swap_parts(y, x, begin, middle, end):  # type: ignore[no-untyped-def]
    """Copy x[begin:middle] and x[middle:end] to y, swapped."""
    _copy(y, begin, x, middle, end)
    _copy(y, begin + end - middle, x, begin, middle)


@kernel()
def _move_interval(x, y, nearest, random):  # type: ignore[no-untyped-def]
    """Move an interval, more often a short one, to a random node."""
    begin = _below(random, len(x))
    end = begin + 1 + _below(random, 1 + _below(random, len(x) - begin))
    _fill(y, begin, end, _random_node(x, begin, end, nearest, random))
    return begin, end


@kernel()
def _move_segment(x, y, nearest, random):  # type: ignore[no-untyped-def]
    """Move a segment to a random node."""
    begin, end = _segment(x, _below(random, len(x)))
    _fill(y, begin, end, _random_node(x, begin, end, nearest, random))
    return begin, end


@kernel()
def _move_boundary(x, y, random):  # type: ignore[no-untyped-def]
    """Shift a boundary between two segments, mostly by one atom."""
    begin, end = _segment(x, _below(random, len(x)))
    width = 1 if _below(random, 4) else 1 + _below(random, 4)
    if _below(random, 2):
        begin, end, node = end, min(end + width, len(x)), x[begin]
    else:
        begin, end, node = max(begin - width, 0), begin, x[begin]
    _fill(y, begin, end, node)
    return begin, end


@kernel()
def _shift_atoms(x, y, nearest, random):  # type: ignore[no-untyped-def]
    """One segment loses one or a few atoms, another gains as many, and all boundaries between them shift.

    A quarter of the time, the gained atoms go to a random node instead.
    """
    giver, taker = _below(random, len(x)), _below(random, len(x))
    width = 1 if _below(random, 4) else 1 + _below(random, 4)
    width = min(width, abs(taker - giver) + 1)
    if giver < taker:
        begin, end = taker + 1 - width, taker + 1
        _copy(y, giver, x, giver + width, end)
    else:
        begin, end = taker, taker + width
        _copy(y, end, x, taker, giver + 1 - width)
    _fill(y, begin, end, _random_node(x, begin, end, nearest, random) if _below(random, 4) == 0 else x[taker])
    return min(giver, taker), max(giver, taker) + 1


@kernel()
def _swap_nodes(x, y, nodes, random):  # type: ignore[no-untyped-def]
    """Swap two nodes in the whole placement."""
    one = x[_below(random, len(x))]
    other = x[_below(random, len(x))] if _below(random, 2) else _below(random, nodes)
    begin, end = len(x), 0
    for atom in range(len(x)):
        if x[atom] == one or x[atom] == other:
            y[atom] = other if x[atom] == one else one
            begin, end = min(begin, atom), atom + 1
    return begin, end


@kernel()
def _swap_atoms(x, y, random):  # type: ignore[no-untyped-def]
    """Swap the nodes of two atoms."""
    one, other = _below(random, len(x)), _below(random, len(x))
    y[one], y[other] = x[other], x[one]
    return min(one, other), max(one, other) + 1


@kernel()
def _swap_segments(x, y, random):  # type: ignore[no-untyped-def]
    """Swap two segments, each with its number of atoms."""
    begin, middle = _segment(x, _below(random, len(x)))
    last, end = _segment(x, _below(random, len(x)))
    if last < begin:
        begin, middle, last, end = last, end, begin, middle
    if begin < last:
        _copy(y, begin, x, last, end)
        _copy(y, begin + end - last, x, middle, last)
        _copy(y, begin + end - middle, x, begin, middle)
    return begin, end


@kernel()
def _reorder_segments(x, y, random):  # type: ignore[no-untyped-def]
    """Reverse consecutive segments, or swap them with the segments that follow."""
    begin = _segment(x, _below(random, len(x)))[0]
    middle = _segment(x, begin + _below(random, len(x) - begin))[1]
    if _below(random, 2):
        _reverse(y, x, begin, middle)
        return begin, middle
    if middle == len(x):
        return 0, 0
    end = _segment(x, middle + _below(random, len(x) - middle))[1]
    _swap_parts(y, x, begin, middle, end)
    return begin, end


@kernel()
def _join_segments(x, y, nearest, random):  # type: ignore[no-untyped-def]
    """Make a segment adjacent to one on a nearby node.

    One of the two moves, or the segments between them are reversed together with one of the two.
    """
    begin, end = _segment(x, _below(random, len(x)))
    node = nearest[x[begin], _below(random, nearest.shape[1])]
    at, left = _below(random, len(x)), len(x)
    while left > 0 and x[at] != node:
        at = at + 1 if at + 1 < len(x) else 0
        left -= 1
    if left == 0 or node == x[begin]:
        return 0, 0
    first, last = _segment(x, at)
    if first < begin:
        begin, end, first, last = first, last, begin, end
    variant = _below(random, 4)
    if variant == 0:
        _reverse(y, x, end, last)
    elif variant == 1:
        _reverse(y, x, begin, first)
    elif variant == 2:
        _swap_parts(y, x, end, first, last)
    else:
        _swap_parts(y, x, begin, end, first)
    return begin, last


@kernel()
def _dissolve_segment(x, y, random):  # type: ignore[no-untyped-def]
    """Divide a segment between its neighbours."""
    begin, end = _segment(x, _below(random, len(x)))
    if begin == 0 and end == len(x):
        return 0, 0
    middle = begin + _below(random, end - begin + 1)
    if begin == 0 or end == len(x):
        middle = begin if begin == 0 else end
    if begin > 0:
        _fill(y, begin, middle, x[begin - 1])
    if end < len(x):
        _fill(y, middle, end, x[end])
    return begin, end


@kernel()
def _random_neighbour(x, y, nearest, random):  # type: ignore[no-untyped-def]
    """Turn `y`, a copy of `x`, into a random neighbour. Returns the range begin..end-1 in which they may differ."""
    kind = _MOVE_TABLE[_below(random, len(_MOVE_TABLE))]
    if kind == 0:
        return _move_interval(x, y, nearest, random)
    if kind == 1:
        return _move_segment(x, y, nearest, random)
    if kind == 2:
        return _move_boundary(x, y, random)
    if kind == 3:
        return _shift_atoms(x, y, nearest, random)
    if kind == 4:
        return _swap_nodes(x, y, len(nearest), random)
    if kind == 5:
        return _dissolve_segment(x, y, random)
    if kind == 6:
        return _swap_segments(x, y, random)
    if kind == 7:
        return _swap_atoms(x, y, random)
    if kind == 8:
        return _reorder_segments(x, y, random)
    return _join_segments(x, y, nearest, random)


@kernel()
def _finite(cost):  # type: ignore[no-untyped-def]
    """(cost, 0) if `cost` is finite, else (0, 1)."""
    return (cost, 0.0) if cost < np.inf else (0.0, 1.0)


@kernel(error_model="numpy")
def _node_cost(load, memory, memory_limit, headroom, free, queue_weight, unit_costs):  # type: ignore[no-untyped-def]
    """The cost of a node that holds atoms, with penalties for violated limits, and whether it violates any.

    All arguments are scalars, as passing an array costs more than this computation.
    """
    per_byte, least_bytes, per_load, least_load = unit_costs
    cost, broken = 0.0, 0.0
    if memory > memory_limit * (1.0 + ROUNDING):
        cost += per_byte * (memory - memory_limit + least_bytes)
        broken = 1.0
    if load > headroom + ROUNDING:
        cost += per_load * (load - headroom + least_load)
        broken = 1.0
        load = max(headroom, 0.0)
    return cost + queue_weight * load / (free - load), broken


@kernel()
def _unit_costs(arrays, penalty):  # type: ignore[no-untyped-def]
    """The penalty per unit and the least excess counted, for memory and for load."""
    return penalty[0], arrays.min_excess[0], penalty[1], arrays.min_excess[1]


@kernel()
def _peak(headroom, background, lowest, sums):  # type: ignore[no-untyped-def]
    """The highest utilisation, where that of each node is cut off at its ceiling."""
    peak = lowest
    for node in range(len(headroom)):
        peak = max(peak, background[node] + min(sums[node, LOAD], max(headroom[node], 0.0)))
    return peak


@kernel()
def _new_peak(headroom, background, lowest, peak, sums, saved, touched):  # type: ignore[no-untyped-def]
    """`_peak` after a move. Only the changed nodes are considered if that suffices."""
    new = 0.0
    for at in range(touched):
        node = np.int64(saved[at, TOUCHED])
        if background[node] + saved[at, LOAD] >= peak > lowest:
            return _peak(headroom, background, lowest, sums)
        new = max(new, background[node] + min(sums[node, LOAD], max(headroom[node], 0.0)))
    return max(peak, new)


@kernel()
def _transfer(x, atom, arrays):  # type: ignore[no-untyped-def]
    """`_finite` of the cost of the transfer to atom `atom`, where the number of atoms stands for the end."""
    if atom == 0:
        return _finite(arrays.ends[0, x[0]])
    if atom == len(x):
        return _finite(arrays.ends[1, x[atom - 1]])
    return _finite(arrays.hops[arrays.hop_of[atom], x[atom - 1], x[atom]])


@kernel(error_model="numpy")
def _apply_move(x, y, begin, end, arrays, penalty, sums, saved):  # type: ignore[no-untyped-def]
    """Update `sums` from `x` to `y`, which differ in atoms begin..end-1 only.

    Returns the change of the cost (without the peak), the change of the number of violated limits, and the number of
    changed nodes, whose old sums are in `saved`.
    """
    change, missing, touched = 0.0, 0.0, 0
    for atom in range(begin, end + 1):
        (before, lacked), (now, lacks) = _transfer(x, atom, arrays), _transfer(y, atom, arrays)
        change += now - before
        missing += lacks - lacked
        if atom == end or x[atom] == y[atom]:
            continue
        for side in range(2):
            node, sign = (y[atom], 1.0) if side else (x[atom], -1.0)
            if sums[node, TOUCHED] == 0.0:
                saved[touched, TOUCHED] = node
                for column in range(TOUCHED):
                    saved[touched, column] = sums[node, column]
                sums[node, TOUCHED] = 1.0
                touched += 1
            load, lacks = _finite(arrays.load[atom, node])
            sums[node, LOAD] += sign * load
            sums[node, MEMORY] += sign * arrays.memory[atom]
            sums[node, ATOMS] += sign
            change += sign * arrays.fixed[atom, node]
            missing += sign * lacks
    change, broken = _price_touched(change, missing, arrays, penalty, sums, saved, touched)
    return change + penalty[2] * missing, broken, touched


@kernel(error_model="numpy")
def _price_touched(change, broken, arrays, penalty, sums, saved, touched):  # type: ignore[no-untyped-def]
    """Price the nodes that a move changed anew.

    Returns `change` and `broken` with the change of their cost and of the number of limits that they violate added.
    """
    unit_costs = _unit_costs(arrays, penalty)
    for at in range(touched):
        node = np.int64(saved[at, TOUCHED])
        cost, breaks = 0.0, 0.0
        if sums[node, ATOMS] > 0.0:
            cost, breaks = _node_cost(
                sums[node, LOAD],
                sums[node, MEMORY],
                arrays.memory_limit[node],
                arrays.headroom[node],
                1.0 - arrays.background[node],
                arrays.queue_weight[node],
                unit_costs,
            )
        else:  # removes the rounding errors of many moves
            sums[node, LOAD] = sums[node, MEMORY] = 0.0
        sums[node, COST], sums[node, BROKEN], sums[node, TOUCHED] = cost, breaks, 0.0
        change += cost - saved[at, COST]
        broken += breaks - saved[at, BROKEN]
    return change, broken


@kernel(error_model="numpy")
def _evaluate(x, arrays, penalty, sums):  # type: ignore[no-untyped-def]
    """Fill `sums` for a placement. Returns its cost with penalties, the number of violated limits, and its peak."""
    memory_limits, headroom, background = arrays.memory_limit, arrays.headroom, arrays.background
    cost, missing, queue_weight, unit_costs = 0.0, 0.0, arrays.queue_weight, _unit_costs(arrays, penalty)
    sums[:] = 0.0
    for atom in range(len(x) + 1):
        transfer, lacks = _transfer(x, atom, arrays)
        cost += transfer
        missing += lacks
        if atom == len(x):
            break
        node = x[atom]
        load, lacks = _finite(arrays.load[atom, node])
        sums[node, LOAD] += load
        sums[node, MEMORY] += arrays.memory[atom]
        sums[node, ATOMS] += 1.0
        cost += arrays.fixed[atom, node]
        missing += lacks
    broken = missing
    for node in range(len(sums)):
        if sums[node, ATOMS] > 0.0:
            sums[node, COST], sums[node, BROKEN] = _node_cost(
                sums[node, LOAD],
                sums[node, MEMORY],
                memory_limits[node],
                headroom[node],
                1.0 - background[node],
                queue_weight[node],
                unit_costs,
            )
        cost += sums[node, COST]
        broken += sums[node, BROKEN]
    peak = _peak(headroom, background, arrays.peak, sums)
    return cost + penalty[2] * missing + arrays.balance_weight * peak, broken, peak


@kernel()
def _undo_move(sums, saved, touched):  # type: ignore[no-untyped-def]
    """Undo the last move, which changed `touched` nodes."""
    for at in range(touched):
        node = np.int64(saved[at, TOUCHED])
        for column in range(TOUCHED):
            sums[node, column] = saved[at, column]


@kernel()
def _adapt_penalties(penalty, first, share_broken):  # type: ignore[no-untyped-def]
    """Raise the penalties if most steps violated limits, lower them if few did."""
    factor = 1.0
    if share_broken > HIGH_BROKEN_SHARE:
        factor = PENALTY_INCREASE
    elif share_broken < LOW_BROKEN_SHARE:
        factor = PENALTY_DECREASE
    for kind in range(LIMIT_KINDS):
        penalty[kind] = min(max(penalty[kind] * factor, first[kind] * MIN_PENALTY), first[kind] * MAX_PENALTY)


def _example() -> tuple[KernelArrays, FloatArray, Indices, float, int, State]:
    """Arrays whose types define the signatures of the compiled functions."""
    line, plane, cube, whole = np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1, 1)), np.zeros(1, np.int64)
    wholes = np.zeros((1, 1), np.int64)
    arrays = KernelArrays(plane, plane, line, line, plane, cube, whole, line, line, wholes, line, 0.0, 0.0, line)
    return arrays, line, whole, 0.0, 0, np.zeros(1, np.uint64)


_ARRAYS, _LINE, _WHOLE, _NUMBER, _COUNT, _STATE = map(typeof, _example())


@kernel([(_WHOLE, _ARRAYS, _LINE)])
def penalised_cost(x, arrays, penalty):  # type: ignore[no-untyped-def]
    """The objective of a placement `x` (A,) with `penalty` (LIMIT_KINDS,), and the number of violated limits.

    Missing links and times cost the penalty only. A load above its ceiling has the queueing cost of the ceiling.
    """
    cost, broken, _ = _evaluate(x, arrays, penalty, np.zeros((len(arrays.headroom), COLUMNS)))
    return cost, broken


@kernel([(_WHOLE, _WHOLE, _NUMBER, _ARRAYS, _LINE, _LINE, _NUMBER, _NUMBER, _COUNT, _STATE)])
def walk(x, best, best_cost, arrays, penalty, first_penalty, hot, cold, steps, random):  # type: ignore[no-untyped-def]
    """Make `steps` random moves on `x` (A,), in place, while the temperature falls from `hot` to `cold`.

    Temperatures are in units of the objective. `penalty` (LIMIT_KINDS,) adapts, within a range around `first_penalty`.
    If legal placements cheaper than `best_cost` are found, the cheapest is written to `best` (A,) and its cost is
    returned; otherwise `best_cost` is returned. `random` (1,) is the state of the random numbers.
    """
    headroom, background, lowest = arrays.headroom, arrays.background, arrays.peak
    sums, saved, y = np.zeros((len(headroom), COLUMNS)), np.zeros((len(headroom), COLUMNS)), x.copy()
    temperature, cooling = hot, (cold / hot) ** (ADAPT_EVERY / steps)
    cost, broken, peak = _evaluate(x, arrays, penalty, sums)
    new_peak, broken_steps = peak, 0
    for step in range(1, steps + 1):
        begin, end = _random_neighbour(x, y, arrays.nearest, random)
        if begin < end:
            change, breaks, touched = _apply_move(x, y, begin, end, arrays, penalty, sums, saved)
            if arrays.balance_weight > 0.0:
                new_peak = _new_peak(headroom, background, lowest, peak, sums, saved, touched)
                change += arrays.balance_weight * (new_peak - peak)
            if change <= 0.0 or _share(random) < np.exp(-change / temperature):
                _copy(x, begin, y, begin, end)
                cost, broken, peak = cost + change, broken + breaks, new_peak
            else:
                _copy(y, begin, x, begin, end)
                _undo_move(sums, saved, touched)
        better, adapts = broken == 0.0 and cost < best_cost, step % ADAPT_EVERY == 0
        broken_steps += broken > 0.0
        if adapts:
            temperature *= cooling
            _adapt_penalties(penalty, first_penalty, broken_steps / ADAPT_EVERY)
            broken_steps = 0
        if better or adapts:  # removes the rounding errors of many moves
            cost, broken, peak = _evaluate(x, arrays, penalty, sums)
        if better and broken == 0.0 and cost < best_cost:
            best_cost = cost
            _copy(best, 0, x, 0, len(x))
    return best_cost
