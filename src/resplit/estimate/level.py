"""A value that is constant for a while and then jumps: a Kalman filter with a sequential test for jumps.

The filter is that of a local level (a random walk seen through noise). The test is a two-sided CUSUM over the
normalised innovations (Page, 1954): many small deviations to one side raise the alarm, as does one large deviation.
After an alarm, the level restarts from the values that raised it.

What disturbs a time for a moment, a busy host or a queue, only ever makes it longer. So a jump upwards may be asked to
show at several moments: then one usual value takes back what late ones have added up, and the level restarts from the
least late value after the first.
"""

from __future__ import annotations

import math
from collections import deque

__all__ = ["Level", "age_s", "log_ratio"]

_SLACK = 1.0  # deviations below this many standard deviations do not add up
_CONTRADICTION = 3.0  # and count so many times against what has added up: after a jump there are hardly any
_ALARM = 6.0  # sum at which the alarm is raised
_LARGEST = 6.0  # one value counts at most this many standard deviations, so that no single one raises the alarm
_OUTLIER = 3.0  # a value that deviates by more says nothing about the level, unless the next ones confirm it
_NOISE_MEMORY = 0.05  # weight of the newest value in the estimate of the noise
_EXCURSION = 8  # values from which the level restarts, at most
# A time that is off by more than this factor is no measurement: a member may say anything.
_LARGEST_FACTOR = 1000.0


def log_ratio(measured_s: float, expected_s: float | None) -> float | None:
    """The logarithm of measured over expected time, within bounds; None if one of them is no time."""
    if not expected_s or not (0 < measured_s < math.inf and 0 < expected_s < math.inf):
        return None
    return math.log(min(max(measured_s / expected_s, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR))


def age_s(at_s: float, *levels: Level) -> float | None:
    """Seconds at `at_s` since the newest value of these levels; None if there is none."""
    age = at_s - max([level.seen_s for level in levels])
    return max(0.0, age) if math.isfinite(age) else None


class Level:
    """The estimated level of a noisy value, with its variance.

    `noise` is a first guess of the standard deviation of one value, and its lower bound. `drift` is the standard
    deviation by which the level may wander in one second. A jump of less than `least` raises no alarm. One upwards
    has to show at so many `moments`, each at least `apart_s` after the one before, and in all values since the first.
    """

    def __init__(self, noise: float, drift: float, least: float, moments: int = 1, apart_s: float = 0.0) -> None:
        self.mean = 0.0
        self._variance = math.inf  # of the mean; infinite before the first value
        self._least_noise = noise**2
        self._noise = noise**2
        self._drift = drift**2
        self._least = least
        self._moments, self._apart_s = moments, apart_s
        self._high = 0  # moments at which the values of the excursion upwards were seen
        self._high_s = -math.inf  # the last of them
        self._at_s = -math.inf
        self._sums = {1.0: 0.0, -1.0: 0.0}
        self._excursions = {side: deque[float](maxlen=_EXCURSION) for side in self._sums}
        self._calm = True  # nothing has added up, to neither side

    @property
    def known(self) -> bool:
        """Whether any value was seen."""
        return math.isfinite(self._variance)

    @property
    def seen_s(self) -> float:
        """When the last value was seen; -inf before the first."""
        return self._at_s

    @property
    def doubted(self) -> bool:
        """Whether the last values say that the level has jumped, and one more like them would raise the alarm."""
        if self._calm:
            return False
        return max(self._sums.values()) > (_ALARM / 2 if self._moments == 1 else _SLACK)

    def deviation(self, at_s: float) -> float:
        """The standard deviation of the level at `at_s`: it grows with the time since the last value."""
        return math.sqrt(self._variance + self._drift * self._age_s(at_s))

    def restart(self, mean: float) -> None:
        """Take `mean` as the level, known as well as a single value is."""
        self.mean, self._variance = mean, self._noise
        self._clear()

    def shift(self, by: float) -> None:
        """Count from another zero: all that was seen so far is larger by `by`."""
        self.mean += by
        for excursion in self._excursions.values():
            values = [value + by for value in excursion]
            excursion.clear()
            excursion.extend(values)

    def observe(self, value: float, at_s: float, extra_noise: float = 0.0) -> bool:
        """Take a value seen at `at_s`; returns whether it raises the alarm that the level has jumped.

        `extra_noise` is a standard deviation that this value has in addition.
        """
        age_s, self._at_s = self._age_s(at_s), max(at_s, self._at_s)
        extra = extra_noise**2
        noise = self._noise + extra
        if not self.known:
            self.mean, self._variance = value, noise
            return False
        variance = self._variance = self._variance + self._drift * age_s
        deviation = math.sqrt(variance + noise)
        error = value - self.mean
        usual = self._calm and -_SLACK * deviation <= error <= _SLACK * deviation  # nearly always
        if not usual and (before := self._restarted(value, error / deviation, noise)) is not None:
            return abs(self.mean - before) >= self._least
        bounded = min(abs(error), _OUTLIER * deviation)
        if bounded == abs(error):  # no outlier
            gain = variance / (variance + noise)
            self.mean += gain * error
            self._variance = variance * (1 - gain)
        seen = max(0.0, bounded**2 - extra)
        self._noise = max(self._noise + _NOISE_MEMORY * (seen - self._noise), self._least_noise)
        return False

    def _age_s(self, at_s: float) -> float:
        """Seconds since the last value; 0 before the first."""
        age_s = at_s - self._at_s
        return age_s if 0.0 < age_s < math.inf else 0.0

    def _restarted(self, value: float, normalised: float, noise: float) -> float | None:
        """Add the normalised deviation of a value to the sums. On an alarm, restart from the values since the jump.

        Returns the level before, or None without an alarm.
        """
        bounded = max(-_LARGEST, min(_LARGEST, normalised))
        for side, excursion in self._excursions.items():
            excess = side * bounded - _SLACK
            self._sums[side] = max(0.0, self._sums[side] + (excess if excess > 0 else _CONTRADICTION * excess))
            if self._sums[side] == 0 or (self._must_last(side) and value - self.mean < self._least / 2):
                self._forget(side)
                continue
            excursion.append(value)
            if side > 0 and self._at_s >= self._high_s + self._apart_s:
                self._high, self._high_s = self._high + 1, self._at_s
            if self._sums[side] > _ALARM and (side < 0 or self._high >= self._moments):
                after, before = list(excursion), self.mean
                # The jump may have come during the first value, which then shows a part of it.
                after = [min(after[1:])] if self._must_last(side) else self._after_jump(after)
                self.mean, self._variance = sum(after) / len(after), noise / len(after)
                self._clear()
                return before
        self._calm = not any(self._sums.values())
        return None

    def _must_last(self, side: float) -> bool:
        return self._moments > 1 and side > 0

    def _after_jump(self, excursion: list[float]) -> list[float]:
        """The values since the most likely moment of the jump."""
        suffixes = [excursion[first:] for first in range(len(excursion))]
        return max(suffixes, key=lambda values: sum(value - self.mean for value in values) ** 2 / len(values))

    def _clear(self) -> None:
        for side in self._sums:
            self._forget(side)
        self._calm = True

    def _forget(self, side: float) -> None:
        """Forget the values that deviate to one side."""
        self._sums[side] = 0.0
        self._excursions[side].clear()
        if side > 0:
            self._high, self._high_s = 0, -math.inf
