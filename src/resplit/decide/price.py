"""The price of an alternative: the gain of a placement over a horizon, and the cost of the move to it.

With total request rate L, horizon H, transfer time T, pause P, mean latency W and objective f (equation 3):

    cost(keep)  = L H f(current)
    cost(other) = L [(H - T) f(other) + T f(current)] + alpha L P (W + P / 2)
    net gain    = cost(keep) - cost(other)

docs/adr/0004-decide.md derives these formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from resplit.decide.state import NOTHING_READY, Placement, Ready, Settings, Unbounded
from resplit.planner.evaluate import Evaluation, evaluate, slo_shortfall_s
from resplit.types import Problem

__all__ = ["Action", "Alternative", "CurrentPlacement", "is_staged", "price", "price_current"]

SLACK = 0.02  # a limit of memory or use that is exceeded by less is measurement noise, not a reason to move
Action = Literal["keep", "redistribute", "re-split", "rollback"]


@dataclass(frozen=True)
class Alternative:
    """One alternative with its price. Without a legal plan `placement` is None and `reason` says why.

    `latency_s` (mean), `objective` and `shortfall_s` (sum over the classes of the seconds by which each misses its
    service objective) hold once the placement is live. `gain_per_request` and `net_gain` (over `horizon_s`, the cost
    of the move subtracted) are in units of the objective; both are infinite if the current placement cannot serve.
    """

    action: Action
    placement: Placement | None
    objective: Unbounded = math.inf
    latency_s: Unbounded = math.inf
    shortfall_s: Unbounded = 0.0
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    transfer_s: Unbounded = 0.0
    pause_s: Unbounded = 0.0
    expected_requests: float = 0.0
    gain_per_request: Unbounded = 0.0
    net_gain: Unbounded = 0.0
    horizon_cost: Unbounded = math.inf
    lower_bound: float | None = None
    violations: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class CurrentPlacement:
    """The current placement under the present state, priced as the alternative `keep`.

    `broken` says why it cannot serve (a lost node, a private block on an untrusted node, a missing link, overload),
    `exceeded` which limit of memory or use it exceeds although it serves. Both are "" otherwise. `cached_tokens` is the
    number of tokens in the caches that a move transfers. `stalled` is the share of the time by which requests fall
    behind: 0 while it serves, 1 in an outage, 1 - 1/u under an overload u, which is served at the rate 1/u.
    """

    keep: Alternative
    broken: str
    exceeded: str
    cached_tokens: float
    stalled: float = 0.0


def price_current(problem: Problem, settings: Settings) -> CurrentPlacement:
    """Price `problem.current`, which must not be None, under the present state."""
    assert problem.current is not None
    if absent := sorted(set(problem.current) - {node.name for node in problem.nodes}):
        broken = f"{', '.join(absent)}: no longer in the cluster"
        keep = Alternative("keep", problem.current, violations=(broken,))
        return CurrentPlacement(keep, broken, "", problem.kv_tokens, stalled=1.0)
    result = evaluate(problem, problem.current)
    outage, overload = _outage(result), _overload(problem, result, problem.current)
    broken = "; ".join(filter(None, (overload, outage)))
    most_used = max(
        use
        for node, use in zip(problem.nodes, result.utilization.tolist(), strict=True)
        if node.name in problem.current
    )
    stalled = 1.0 if outage else 1 - 1 / most_used if overload else 0.0
    requests = _rate_rps(problem) * settings.horizon_s
    keep = replace(
        _alternative(problem, "keep", problem.current, result),
        expected_requests=requests,
        horizon_cost=math.inf if broken else requests * result.objective,
    )
    return CurrentPlacement(keep, broken, "" if broken else _exceeded(result), _cached_tokens(problem, result), stalled)


def price(
    problem: Problem, action: Action, placement: Placement, current: CurrentPlacement, settings: Settings,
    ready: Ready = NOTHING_READY,
) -> Alternative:  # fmt: skip
    """Price a move from `problem.current` to `placement`.

    Until weights and caches are transferred, the current placement serves, so the gain counts for the rest of the
    horizon only. At the switch the requests in progress wait for the pause. They wait for the transfer too if the
    current placement cannot serve, or if the new blocks do not fit in memory beside the old ones: such a staged move
    also waits for the passes under way. An overloaded placement still serves, so they wait for a part of it. Weights
    of blocks that are `ready` are there.
    """
    assert problem.current is not None
    other = _alternative(problem, action, placement, evaluate(problem, placement))
    moved = [j for j, (old, new) in enumerate(zip(problem.current, placement, strict=True)) if old != new]
    loads = [j for j in moved if (j, placement[j]) not in ready.loaded]
    transfer_s = _transfer_s(problem, moved, loads, placement, current.cached_tokens, settings)
    pause_s = (settings.switch_s + _round_trip_s(problem, moved, placement)) if moved else 0.0
    stalled_s = current.stalled * transfer_s
    if current.stalled < 1 and is_staged(problem, placement):
        pause_s, stalled_s = pause_s + _pass_s(problem) + transfer_s, 0.0
    served_s = max(settings.horizon_s - transfer_s, 0.0)
    before = other if current.broken else current.keep  # priced for the time of the transfer
    waiting_cost = _waiting_cost(problem, pause_s + stalled_s, before.latency_s)
    objectives = served_s * other.objective + (settings.horizon_s - served_s) * before.objective
    horizon_cost = _rate_rps(problem) * objectives + waiting_cost
    return replace(
        other,
        weight_bytes=float(sum(problem.blocks[j].weight_bytes for j in loads)),
        cache_bytes=float(sum(problem.blocks[j].kv_bytes_per_token for j in moved) * current.cached_tokens),
        transfer_s=transfer_s,
        pause_s=pause_s,
        expected_requests=_rate_rps(problem) * served_s,
        gain_per_request=_gain(math.inf if current.broken else current.keep.objective, other.objective),
        net_gain=_gain(current.keep.horizon_cost, horizon_cost),
        horizon_cost=horizon_cost,
    )


def _waiting_cost(problem: Problem, outage_s: float, latency_s: float) -> float:
    """The cost alpha L P (W + P / 2) of an outage of P seconds.

    It delays the L W requests in progress (Little's law) by P, and the requests that arrive meanwhile by P / 2 on
    average.
    """
    rate_rps = _rate_rps(problem)
    return problem.weights.latency * outage_s * (rate_rps * latency_s + rate_rps * outage_s / 2)


def _gain(before: float, after: float) -> float:
    """before - after. Where both are infinite, that is, neither placement can serve, the gain is 0."""
    if math.isfinite(after):
        return before - after
    return -math.inf if math.isfinite(before) else 0.0


def _alternative(problem: Problem, action: Action, placement: Placement, result: Evaluation) -> Alternative:
    return Alternative(
        action,
        placement,
        objective=result.objective,
        latency_s=result.terms.latency_s,
        shortfall_s=float(sum(slo_shortfall_s(problem, result).values())),
        violations=tuple(violation.text for violation in result.violations),
    )


def _outage(result: Evaluation) -> str:
    """Why the placement serves nobody; "" if it serves. A limit that is merely exceeded does not count."""
    kinds = ("privacy", "cannot_run", "link")
    return "; ".join(each.text for each in result.violations if each.kind in kinds)


def _overload(problem: Problem, result: Evaluation, placement: Placement) -> str:
    """The nodes that get more than they can serve, so that queues grow for ever; "" if there is none."""
    return "; ".join(
        f"{node.name} is overloaded ({use:.2f})"
        for node, use in zip(problem.nodes, result.utilization, strict=True)
        if use >= 1 and node.name in placement
    )


def _exceeded(result: Evaluation) -> str:
    """The limits of memory and utilisation that are exceeded by more than noise; "" if none is."""
    return "; ".join(
        each.text
        for each in result.violations
        if (each.kind == "memory" and each.excess > SLACK * each.limit)
        or (each.kind == "utilization" and each.excess > SLACK)
    )


def _rate_rps(problem: Problem) -> float:
    return sum(request_class.rate_rps for request_class in problem.classes)


def _cached_tokens(problem: Problem, result: Evaluation) -> float:
    """Tokens in the caches of the requests in progress, with half of their new tokens made; at most `kv_tokens`.

    Little's law gives the number of requests of each class. Under an overload it grows for ever, and is not known: the
    change was noticed a moment ago, so the requests in progress are taken to be those of a placement without queues.
    """
    unqueued_s = result.compute_s + result.network_s
    mean = sum(
        request_class.rate_rps * latency_s * (request_class.prompt_tokens + request_class.new_tokens / 2)
        for request_class, latency_s in zip(
            problem.classes,
            np.where(np.isfinite(result.class_latency_s), result.class_latency_s, unqueued_s).tolist(),
            strict=True,
        )
    )
    return float(min(mean, problem.kv_tokens)) if math.isfinite(mean) else problem.kv_tokens


def _transfer_s(
    problem: Problem, moved: Sequence[int], loads: Sequence[int], placement: Placement, cached_tokens: float,
    settings: Settings,
) -> float:  # fmt: skip
    """Seconds until the last node has its new blocks. Nodes load `loads` in parallel, each one block after another.

    Weights come from the registry, caches from their old holder if it can still be reached.
    """
    assert problem.current is not None
    busy_s = dict.fromkeys(placement, 0.0)
    for j in moved:
        block, target = problem.blocks[j], placement[j]
        if j not in loads:
            pass
        elif settings.registry_bytes_per_s:
            busy_s[target] += block.weight_bytes / settings.registry_bytes_per_s
        else:
            busy_s[target] += _sending_s(problem, problem.classes[0].source, target, block.weight_bytes)
        busy_s[target] += _sending_s(problem, problem.current[j], target, block.kv_bytes_per_token * cached_tokens)
    return max(busy_s.values())


def is_staged(problem: Problem, placement: Placement) -> bool:
    """Whether a node that receives blocks has no memory to hold them beside its old ones."""
    assert problem.current is not None
    for node in problem.nodes:
        places = list(zip(problem.blocks, problem.current, placement, strict=True))
        both = [block for block, *holders in places if node.name in holders]
        needed = sum(block.weight_bytes + problem.kv_tokens * block.kv_bytes_per_token for block in both)
        if needed > node.memory_bytes and any(new == node.name != old for _, old, new in places):
            return True
    return False


def _pass_s(problem: Problem) -> float:
    """Seconds until the passes under way have ended: the compute time of a mean prompt under the current placement."""
    assert problem.current is not None
    places = {node.name: index for index, node in enumerate(problem.nodes)}
    hosts = [places[name] for name in problem.current]
    per_token_s = float(problem.prefill_s_per_token[np.arange(len(hosts)), hosts].sum())
    tokens = np.average(
        [each.prompt_tokens for each in problem.classes], weights=[each.rate_rps for each in problem.classes]
    )
    return per_token_s * float(tokens)


def _sending_s(problem: Problem, source: str, target: str, size_bytes: float) -> float:
    """Seconds to send `size_bytes` from one node to another, without latency.

    It is 0 within a node, and without a link, because then no transfer takes place.
    """
    names = [node.name for node in problem.nodes]
    if source == target or source not in names:
        return 0.0
    bytes_per_s = float(problem.link_bandwidth_bytes_per_s[names.index(source), names.index(target)])
    return 0.0 if math.isnan(bytes_per_s) else size_bytes / bytes_per_s


def _round_trip_s(problem: Problem, moved: Sequence[int], placement: Placement) -> float:
    """The longest round trip between an old and a new holder, which the rest of the caches crosses at the switch."""
    assert problem.current is not None
    names = [node.name for node in problem.nodes]
    pairs = {(problem.current[j], placement[j]) for j in moved if problem.current[j] in names}
    latencies = [float(problem.link_latency_s[names.index(old), names.index(new)]) for old, new in pairs]
    return 2 * max((latency for latency in latencies if math.isfinite(latency)), default=0.0)
