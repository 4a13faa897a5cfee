"""The policy `balance`: the closed loop of mesh-llm (pull request 1935), which moves a cut by half a step.

It watches the busy time of the nodes of the chain over a window of ticks. If one node was busier than its neighbour by
more than a margin, half of the blocks that would even them out go to the neighbour. Then it waits for a cooldown. If
requests take longer after that, it goes back. It looks at neither links nor the price of a move.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import ClassVar

import numpy as np

from resplit.decide import Decision
from resplit.decide.state import Placement
from resplit.planner.evaluate import evaluate
from resplit.policies.base import Occasion, Situation, keep, move, utilization
from resplit.types import Problem, Segment, segments_of

__all__ = ["Balance"]

WINDOW = 5  # ticks
MARGIN = 0.15  # of busy time
WORSE = 1.1  # times the latency before a move: roll back


class Balance:
    """Half steps between neighbours, with a cooldown and a rollback."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick"})

    def __init__(self) -> None:
        self._busy: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._before: tuple[Placement, float] | None = None  # the last move: the placement and the latency before it

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """Roll back, take a half step, or keep."""
        self._busy.append(utilization(situation))
        last, measured = situation.history.last, situation.measured
        if last is not None and situation.now_s < last.at_s + situation.settings.cooldown_s:
            return keep(situation, f"the last move was {situation.now_s - last.at_s:.0f} s ago")
        if self._before is not None and measured is not None:
            placement, latency_s = self._before
            self._before = None
            if measured.latency_s > WORSE * latency_s:
                return move(situation, placement, f"requests take {measured.latency_s / latency_s:.2f} times as long")
        if len(self._busy) < WINDOW or measured is None:
            return keep(situation, f"{len(self._busy)} of {WINDOW} ticks were seen")
        step = self._half_step(situation.problem)
        if step is None:
            return keep(situation, "no node is much busier than its neighbour")
        assert situation.problem.current is not None
        self._before = situation.problem.current, measured.latency_s
        self._busy.clear()
        return move(situation, step, "half a step from the busier node to its neighbour")

    def _half_step(self, problem: Problem) -> Placement | None:
        """The placement after the half step between the neighbours that differ most; None if none differ much."""
        assert problem.current is not None
        busy = {node: float(np.mean([each.get(node, 0.0) for each in self._busy])) for node in set(problem.current)}
        segments = segments_of(problem.current)
        pairs = [
            pair
            for one, other in itertools.pairwise(segments)
            for pair in ((one, other), (other, one))
            if busy[pair[0].node] - busy[pair[1].node] > MARGIN
        ]
        for full, free in sorted(pairs, key=lambda pair: busy[pair[1].node] - busy[pair[0].node]):
            placement = _shifted(problem.current, full, free, busy[full.node], busy[free.node])
            if placement and not any(
                each.kind in ("memory", "privacy", "cannot_run", "link")
                for each in evaluate(problem, placement).violations
            ):
                return placement
        return None


def _shifted(current: Placement, full: Segment, free: Segment, most: float, least: float) -> Placement | None:
    """Half of the blocks that would even out the two neighbours, moved from `full` to `free`."""
    blocks = full.last - full.first + 1
    even = blocks * (most - least) / (2 * most)
    count = max(1, int(even / 2))
    if even < 1 or count >= blocks:
        return None
    first = full.first if free.last < full.first else full.last - count + 1
    return tuple(free.node if first <= block < first + count else node for block, node in enumerate(current))
