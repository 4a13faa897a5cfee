"""The budget of a solver: seconds, or a number of steps if answers must be reproducible."""

from __future__ import annotations

import time

__all__ = ["UNLIMITED", "Budget"]


class Budget:
    """A time limit, or a number of steps if `work_limit` is given.

    One move of a descent, one priced path, and one interval or hop of a mixed-integer program are one step each; one
    node of the branch and bound is ten steps.
    """

    def __init__(self, time_limit_s: float, work_limit: int | None = None, parent: Budget | None = None) -> None:
        self._started = time.perf_counter()
        self._time_limit_s = time_limit_s
        self._parent = parent
        self._work_limit = work_limit
        self.steps_left = work_limit

    def spend(self, steps: int = 1) -> bool:
        """Take `steps` from the budget. Returns False once it is spent."""
        if self.steps_left is not None:
            self.steps_left -= steps
        if self._parent is not None:
            self._parent.spend(steps)
        return not self.spent

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.steps_left <= 0 if self.steps_left is not None else self.left_s <= 0

    @property
    def share_spent(self) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        if self.steps_left is not None and self._work_limit is not None:
            return 1 - max(self.steps_left, 0) / max(self._work_limit, 1)
        return min(1.0, self.elapsed_s / self._time_limit_s) if self._time_limit_s > 0 else 1.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the budget was created."""
        return time.perf_counter() - self._started

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; infinite if steps are counted."""
        return float("inf") if self.steps_left is not None else self._time_limit_s - self.elapsed_s

    def part(self, share: float) -> Budget:
        """A budget of `share` of the rest of this one. Steps spent on it are spent on this budget too."""
        if self.steps_left is not None:
            return Budget(self._time_limit_s, min(self.steps_left, 1 + int(self.steps_left * share)), self)
        return Budget(self.left_s * share, None, self)


UNLIMITED = Budget(float("inf"))
