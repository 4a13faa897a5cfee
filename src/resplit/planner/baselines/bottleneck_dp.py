"""The baseline `bottleneck-dp`: dynamic programming for the pipeline whose slowest stage is shortest (PipeEdge).

PipeEdge's states contain the set of used nodes. Here each (boundary, node) keeps its `WIDTH` best sets, which is exact
for few nodes and a beam search for many. A node holds one stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]

WIDTH = 4


@dataclass(frozen=True)
class _Label:
    """A partial pipeline; `period` is its longest stage or transfer, in units of the objective."""

    period: float
    used: frozenset[int]
    stages: tuple[tuple[int, int], ...]  # (end, node)


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Set labels over (boundary, last node). The period is the longest compute or transfer of any stage."""
    atoms = instance.shape[0]
    at: list[list[_Label]] = [[] for _ in range(atoms + 1)]
    at[0] = [_Label(0.0, frozenset(), ())]
    for p in range(atoms):
        for label in _best(at[p]):
            if budget.spent:
                break
            into = instance.hop(p)[label.stages[-1][1]] if label.stages else instance.start
            for q, compute in _stages(instance, p):
                period = np.maximum(np.maximum(into, compute), label.period)
                if q == atoms:
                    period = np.maximum(period, instance.end)
                period[list(label.used)] = np.inf
                for i in np.argsort(period, kind="stable")[: WIDTH * 2]:
                    if np.isfinite(period[i]):
                        node = int(i)
                        at[q].append(_Label(float(period[i]), label.used | {node}, (*label.stages, (q, node))))
    if not at[atoms]:
        return Outcome(None, -np.inf, "no pipeline of distinct nodes was found that holds all blocks")
    nodes_of = np.empty(atoms, dtype=np.intp)
    p = 0
    for q, node in min(at[atoms], key=lambda label: label.period).stages:
        nodes_of[p:q] = node
        p = q
    return Outcome(nodes_of, -np.inf)


def _best(labels: list[_Label]) -> list[_Label]:
    """The `WIDTH` shortest labels of each last node."""
    kept: dict[int, list[_Label]] = {}
    for label in sorted(labels, key=lambda label: label.period):
        last = label.stages[-1][1] if label.stages else -1
        if len(kept.setdefault(last, [])) < WIDTH:
            kept[last].append(label)
    return [label for group in kept.values() for label in group]


def _stages(instance: Instance, p: int) -> list[tuple[int, np.ndarray]]:
    """(q, node time that a request takes from others (N,)) of every stage p..q-1 that some node can hold."""
    stages = []
    for q in range(p + 1, instance.shape[0] + 1):
        fits = (
            (instance.blocked_prefix[q] == instance.blocked_prefix[p])
            & (instance.memory_prefix[q] - instance.memory_prefix[p] <= instance.memory_limit)
            & (instance.load_prefix[q] - instance.load_prefix[p] <= instance.headroom)
        )
        if not fits.any():
            break
        load = instance.load_prefix[q] - instance.load_prefix[p]
        stages.append((q, np.where(fits, instance.latency_weight * load, np.inf)))
    return stages
