"""Forecasts with their uncertainty: the rate at which requests will come, and a value that returns to its mean.

Pure: times are handed in. A forecast is for the middle of a horizon, and stands for the whole of it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

__all__ = ["AHEAD_S", "ArrivalRate", "Forecast", "Reverting"]

AHEAD_S = 60.0  # the middle of the usual horizon of a decision

_DECLARED_S = 10.0  # a declared rate counts as much as so many seconds of observation at first
_KEPT_S = 1.0  # and as much as this for ever: a class that nobody asked for may be asked for again
_MEMORIES_S = (8.0, 30.0, 120.0)  # of the filters of a rate
_FORGETTING = 0.95  # of what is known about which filter is best, for each request

_SAMPLES = 30  # of a value, within `AHEAD_S`
_SPANS = 6  # so many times `AHEAD_S` have to be seen before a value is expected to return to its mean
_MEMORY_SPANS = 30  # older values count less


@dataclass(frozen=True)
class Forecast:
    """What is expected, and its standard deviation."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    mean: float
    deviation: float

    @property
    def cautious(self) -> float:
        """One deviation above the mean: a queue grows by more than it would shrink by one deviation below it."""
        return self.mean + self.deviation


class ArrivalRate:
    """The rate of a Poisson process that changes now and then, in requests per second.

    Each filter has a gamma posterior of the rate whose evidence fades exponentially (West and Harrison, "Bayesian
    Forecasting and Dynamic Models", 1997), each at another pace. They are averaged with the weights that they earn by
    predicting the times between requests, of which older ones count less (dynamic model averaging: Raftery et al.,
    2010). So a rate that lasts becomes well known, and one that has changed is followed after some requests.
    """

    def __init__(self, declared_rps: float, begins_s: float) -> None:
        self._declared_rps = declared_rps
        self._filters = [_FadingRate(memory_s, declared_rps) for memory_s in _MEMORIES_S]
        self._log_weights = [0.0] * len(_MEMORIES_S)
        self._at_s = begins_s  # the last request, or the beginning

    def arrived(self, at_s: float) -> None:
        """Take the arrival of a request."""
        gap_s = self._gap_s(at_s)
        scores = [each.log_density(gap_s) for each in self._filters]
        best = max(scores)
        self._log_weights = [
            _FORGETTING * weight + score - best for weight, score in zip(self._log_weights, scores, strict=True)
        ]
        for each in self._filters:
            each.arrived(gap_s)
        self._at_s = max(at_s, self._at_s)

    def forecast(self, at_s: float) -> Forecast:
        """The rate at `at_s` and after it: nothing shows whether it will rise or fall."""
        gap_s = self._gap_s(at_s)
        logs = [
            weight + each.log_survival(gap_s) for weight, each in zip(self._log_weights, self._filters, strict=True)
        ]
        weights = [math.exp(log - max(logs)) for log in logs]
        shares = [weight / sum(weights) for weight in weights]
        moments = [each.moments(gap_s, self._declared_rps) for each in self._filters]
        mean = sum(share * each for share, (each, _) in zip(shares, moments, strict=True))
        square = sum(share * (variance + each**2) for share, (each, variance) in zip(shares, moments, strict=True))
        return Forecast(mean, math.sqrt(max(0.0, square - mean**2)))

    def _gap_s(self, at_s: float) -> float:
        return max(0.0, at_s - self._at_s)


class _FadingRate:
    """A gamma posterior: as if `shape` requests had come within `seconds`."""

    def __init__(self, memory_s: float, declared_rps: float) -> None:
        self._memory_s = memory_s
        self._shape, self._seconds = declared_rps * _DECLARED_S, _DECLARED_S

    def arrived(self, gap_s: float) -> None:
        """A request came `gap_s` after the one before."""
        self._shape, self._seconds = self._faded(gap_s)
        self._shape += 1.0

    def log_density(self, gap_s: float) -> float:
        """The logarithm of the density of such a time until the next request (Lomax's distribution)."""
        hazard = max(self._shape, 1e-9) / (self._seconds + gap_s)
        return math.log(hazard) + self.log_survival(gap_s)

    def log_survival(self, gap_s: float) -> float:
        """The logarithm of the probability that no request comes within `gap_s`."""
        return self._shape * math.log(self._seconds / (self._seconds + gap_s))

    def moments(self, gap_s: float, declared_rps: float) -> tuple[float, float]:
        """Mean and variance of the rate, `gap_s` after the last request."""
        shape, seconds = self._faded(gap_s)
        shape, seconds = shape + declared_rps * _KEPT_S, seconds + _KEPT_S
        return shape / seconds, shape / seconds**2

    def _faded(self, gap_s: float) -> tuple[float, float]:
        kept = math.exp(-gap_s / self._memory_s)
        return kept * self._shape, kept * self._seconds + gap_s


class Reverting:
    """A value that wanders about its mean: the best linear forecast of it `AHEAD_S` from now.

    With the mean m and the variance v of all that was seen, and half the mean square g of the differences over
    `AHEAD_S` (the variogram), values so far apart have the correlation r = 1 - g / v. So x is followed by
    m + r (x - m), with the variance v (1 - r^2). Until enough was seen, x is expected to stay.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()  # the samples of the last `AHEAD_S`
        self._first_s = math.nan
        self._weight = self._mean = self._square = 0.0  # of all samples, older ones less
        self._pairs = self._differences = 0.0

    def observe(self, value: float, at_s: float) -> None:
        """Take a value; one that comes soon after another says nothing new."""
        if not math.isfinite(value) or (self._recent and at_s < self._recent[-1][0] + AHEAD_S / _SAMPLES):
            return
        if math.isnan(self._first_s):
            self._first_s = at_s
        kept = math.exp(-1 / (_SAMPLES * _MEMORY_SPANS))
        self._weight = kept * self._weight + 1
        self._mean += (value - self._mean) / self._weight
        self._square += (value**2 - self._square) / self._weight
        self._recent.append((at_s, value))
        while len(self._recent) > 1 and self._recent[0][0] <= at_s - AHEAD_S:
            earlier = self._recent.popleft()[1]
            self._pairs = kept * self._pairs + 1
            self._differences += ((value - earlier) ** 2 - self._differences) / self._pairs

    def forecast(self, value: float, at_s: float) -> Forecast:
        """The forecast at `at_s`, when the value is `value`."""
        if not at_s >= self._first_s + _SPANS * AHEAD_S:  # also without any sample
            return Forecast(value, math.sqrt(self._differences))
        variance = max(0.0, self._square - self._mean**2)
        correlation = max(0.0, 1 - self._differences / 2 / variance) if variance > 0 else 1.0
        mean = self._mean + correlation * (value - self._mean)
        return Forecast(mean, math.sqrt(variance * (1 - correlation**2)))
