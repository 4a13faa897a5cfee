"""The policy `threshold`: plans anew when a node was too busy or too slow several times. It prices no move.

The rule is that of Sandpiper (Wood et al., "Black-box and gray-box strategies for virtual machine migration", NSDI
2007): there is a hot spot if a bound was exceeded in k of the last n observations, the last one
included. A bound is one of utilisation or a service objective of the latency. Sandpiper then moves one machine after
the other to the least loaded host. A chain of blocks has a planner for that, so the best plan is taken.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import numpy as np

from resplit.decide import Decision
from resplit.policies.base import Occasion, Situation, best_placement, keep, move, utilization

__all__ = ["Threshold"]

MOST_BUSY = 0.75
HOT, LAST = 3, 5  # k and n


class Threshold:
    """Takes the best plan when there is a hot spot, at most once in each cooldown."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick"})

    def __init__(self) -> None:
        self._hot: deque[bool] = deque(maxlen=LAST)

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """The best plan if a bound was exceeded now and often enough before; keep otherwise."""
        exceeded = _exceeded(situation)
        self._hot.append(bool(exceeded))
        if not exceeded or sum(self._hot) < HOT:
            return keep(
                situation, f"exceeded in {sum(self._hot)} of the last {len(self._hot)} ticks: {exceeded or 'no bound'}"
            )
        last = situation.history.last
        if last is not None and situation.now_s < last.at_s + situation.settings.cooldown_s:
            return keep(situation, f"{exceeded}, but the last move was {situation.now_s - last.at_s:.0f} s ago")
        self._hot.clear()
        return move(situation, best_placement(situation), exceeded)


def _exceeded(situation: Situation) -> str:
    """The bounds that are exceeded now, in words; "" if none is."""
    busy = [f"{node} is {use:.0%} busy" for node, use in utilization(situation).items() if use > MOST_BUSY]
    missed = situation.measured.slo_missed if situation.measured else ()
    return "; ".join([*busy, *(f"{name} misses its service objective" for name in missed)])
