"""Changes that are likely to come, as problems: for each of them a plan can be made before it comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from resplit.types import Problem, segments_of

__all__ = ["LikelyChange", "likely_changes"]

SLOWER = 5.0  # times
FARTHER_S, NARROWER = 0.1, 10.0  # a degraded link: more seconds of latency, and so many times less bandwidth
MORE_LOAD = 2.0  # times


@dataclass(frozen=True)
class LikelyChange:
    """A change in words, and the problem after it. `lost` is the node that it takes, if it takes one."""

    words: str
    problem: Problem
    lost: str | None = None


def likely_changes(problem: Problem) -> list[LikelyChange]:
    """For `problem.current`, which must not be None: each used node lost or slow, each used link degraded, more load.

    Nodes that compute most come first, and the loss of a node before its slowing down: all requests wait for the plan
    after a loss.
    """
    return [*_lost_or_slow(problem), *_degraded(problem), _loaded(problem)]


def _lost_or_slow(problem: Problem) -> Iterator[LikelyChange]:
    names = [node.name for node in problem.nodes]
    place = [names.index(node) for node in problem.current or ()]
    decode_s = problem.decode_s_per_token[np.arange(len(place)), place]  # (blocks,)
    share = {i: float(np.nansum(decode_s[np.array(place) == i])) for i in set(place)}
    for i in sorted(share, key=lambda i: -share[i]):
        yield LikelyChange(f"{names[i]} lost", _times(problem, i, np.nan), names[i])
        yield LikelyChange(f"{names[i]} {SLOWER:g} times slower", _times(problem, i, SLOWER))


def _times(problem: Problem, node: int, factor: float) -> Problem:
    factors = np.where(np.arange(len(problem.nodes)) == node, factor, 1.0)  # (nodes,)
    return replace(
        problem,
        prefill_s_per_token=problem.prefill_s_per_token * factors,
        decode_s_per_token=problem.decode_s_per_token * factors,
    )


def _degraded(problem: Problem) -> Iterator[LikelyChange]:
    names = [node.name for node in problem.nodes]
    stops = [problem.classes[0].source, *(segment.node for segment in segments_of(problem.current or ()))]
    pairs = itertools.pairwise([*stops, stops[0]])
    for one, other in dict.fromkeys(tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1]):
        latency_s, bandwidth = problem.link_latency_s.copy(), problem.link_bandwidth_bytes_per_s.copy()
        for place in itertools.permutations((names.index(one), names.index(other))):
            latency_s[place] += FARTHER_S
            bandwidth[place] /= NARROWER
        changed = replace(problem, link_latency_s=latency_s, link_bandwidth_bytes_per_s=bandwidth)
        yield LikelyChange(f"the link between {one} and {other} degraded", changed)


def _loaded(problem: Problem) -> LikelyChange:
    classes = tuple(replace(each, rate_rps=MORE_LOAD * each.rate_rps) for each in problem.classes)
    return LikelyChange(f"{MORE_LOAD:g} times the load", replace(problem, classes=classes))
