"""What the detector of changes was shown in the last minutes. It can be shown the same again, from a recording."""

from __future__ import annotations

import itertools
from collections import deque

from resplit.cost.model import CostModel
from resplit.estimate import Observation


class Observations:
    """The latest observations, at most `most`. Of a busy cluster, 20,000 are those of some minutes."""

    def __init__(self, most: int = 20_000) -> None:
        self._most = most
        self._kept: deque[Observation] = deque()
        self._cost_before: CostModel | None = None  # the last one that is not kept

    def add(self, seen: Observation) -> None:
        """Add one, and drop the oldest if there are too many."""
        self._kept.append(seen)
        if len(self._kept) > self._most:
            self._cost_before = self._kept.popleft().cost or self._cost_before

    def since_model(self) -> tuple[Observation, ...]:
        """Those since a cost model was set. The first one is that model: the others are compared with it."""
        if self._cost_before is None:
            return tuple(itertools.dropwhile(lambda seen: seen.cost is None, self._kept))
        return (Observation(self._kept[0].at_s, cost=self._cost_before), *self._kept)
