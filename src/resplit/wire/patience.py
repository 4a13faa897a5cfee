"""How much is accepted from one member, useless messages or seconds of work: some at once, and a little each second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Patience:
    """`most` at once, and `per_s` in the long run (a token bucket). Times are on one monotonic clock, in seconds."""

    most: float
    per_s: float
    _noted: float = 0.0  # what is not forgotten yet
    _last_s: float = 0.0

    def note(self, now_s: float, weight: float = 1.0) -> float:
        """Note `weight` more. Returns the seconds until anything more is accepted."""
        self._noted = max(0.0, self._noted - self.per_s * (now_s - self._last_s)) + weight
        self._last_s = now_s
        return max(0.0, (self._noted - self.most) / self.per_s)
