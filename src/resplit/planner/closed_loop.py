"""The demand of a closed loop: streams of which each sends its next request when it has the answer to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from resplit.planner.evaluate import evaluate
from resplit.types import Problem

__all__ = ["with_streams"]


def with_streams(problem: Problem, placement: Sequence[str], streams: int) -> Problem:
    """The problem with the rate that `streams` streams cause, each of which sends one request after another.

    With latency W, their rate is lambda = streams / W (Little's law). A request meets only the other streams, so W is
    that of an open network at the rate lambda (streams - 1) / streams (Schweitzer's approximation). The problem has
    this rate; lambda is found by bisection, as lambda W(lambda) rises.
    """
    low, high = 0.0, 1.0

    def at(rate_rps: float) -> Problem:
        seen_rps = max(rate_rps * (streams - 1) / streams, 1e-9)
        return replace(problem, classes=(replace(problem.classes[0], rate_rps=seen_rps),))

    def in_progress(rate_rps: float) -> float:
        return rate_rps * evaluate(at(rate_rps), placement).terms.latency_s

    while in_progress(high) < streams:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if in_progress(middle) < streams else (low, middle)
    return at(low)
