"""What an alternative to today's placement would bring and cost, in numbers.

Knows the problem's formulas; knows no solver, no history and no preference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from resplit.decide.state import Placement, Settings
from resplit.planner.evaluate import Evaluation, evaluate, slo_shortfall_s
from resplit.types import Problem

__all__ = ["Action", "Alternative", "CurrentPlacement", "price", "price_current"]

SLACK = 0.02  # a limit exceeded by less is noise of the measurement, not a reason to move
Action = Literal["keep", "redistribute", "re-split", "rollback"]


@dataclass(frozen=True)
class Alternative:
    """One thing that could be done, priced. Without a plan `placement` is None and `reason` says why.

    `latency_s` and `objective` are those of the placement once live. `gain_per_request` is in units of the objective;
    `net_gain` is that times `expected_requests`, less the wait that the move costs requests, in the same units.
    Infinite: today's placement cannot serve. `shortfall_s` is by how much classes would miss their objectives.
    """

    action: Action
    placement: Placement | None
    objective: float = math.inf
    latency_s: float = math.inf
    shortfall_s: float = 0.0
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    transfer_s: float = 0.0
    pause_s: float = 0.0
    expected_requests: float = 0.0
    gain_per_request: float = 0.0
    net_gain: float = 0.0
    horizon_cost: float = math.inf
    lower_bound: float | None = None
    violations: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class CurrentPlacement:
    """Today's placement under the fresh state. `broken` says why it cannot go on at all (a lost node, a private block
    on an untrusted one, overload), `over` which limit of memory or use it exceeds while it works; "" where nothing."""

    keep: Alternative
    broken: str
    over: str
    cached_tokens: float


def price_current(problem: Problem, settings: Settings) -> CurrentPlacement:
    """Price `problem.current` (which must be there) under the problem as it stands."""
    assert problem.current is not None
    names = {node.name for node in problem.nodes}
    if gone := sorted(set(problem.current) - names):
        keep = Alternative("keep", problem.current, violations=(f"{', '.join(gone)}: not in the cluster any more",))
        return CurrentPlacement(keep, keep.violations[0], "", problem.kv_tokens)
    result = evaluate(problem, problem.current)
    broken = _broken(problem, result, problem.current)
    keep = replace(
        _outcome(problem, "keep", problem.current, result),
        expected_requests=_rate(problem) * settings.horizon_s,
        horizon_cost=math.inf if broken else _rate(problem) * settings.horizon_s * result.objective,
    )
    over = "" if broken else _over(result)
    return CurrentPlacement(keep, broken, over, _cached_tokens(problem, result))


def price(
    problem: Problem, action: Action, placement: Placement, today: CurrentPlacement, settings: Settings
) -> Alternative:
    """Price a move from `problem.current` to `placement`.

    Until the weights and caches have moved the requests are served as today (make before break), so the gain counts for
    the rest of the horizon; at the switch those that run wait for the pause. Where today's placement cannot serve, or
    has no room beside it for the new one (a staged move), they wait for the transfer too.
    """
    assert problem.current is not None
    result = evaluate(problem, placement)
    moved = [j for j, (old, new) in enumerate(zip(problem.current, placement, strict=True)) if old != new]
    transfer_s = _transfer_s(problem, moved, placement, today.cached_tokens, settings)
    pause_s = (settings.switch_s + _round_trip_s(problem, moved, placement)) if moved else 0.0
    if not today.broken and _is_staged(problem, placement):
        pause_s += transfer_s
    outcome = _outcome(problem, action, placement, result)
    served_s = max(settings.horizon_s - transfer_s, 0.0)
    outage_s = pause_s + (transfer_s if today.broken else 0.0)
    running = _rate(problem) * (outcome.latency_s if today.broken else today.keep.latency_s)
    waited = problem.weights.latency * outage_s * (running + _rate(problem) * outage_s / 2)
    meanwhile = outcome.objective if today.broken else today.keep.objective
    cost = _rate(problem) * (served_s * outcome.objective + (settings.horizon_s - served_s) * meanwhile) + waited
    return replace(
        outcome,
        weight_bytes=float(sum(problem.blocks[j].weight_bytes for j in moved)),
        cache_bytes=float(sum(problem.blocks[j].kv_bytes_per_token for j in moved) * today.cached_tokens),
        transfer_s=transfer_s,
        pause_s=pause_s,
        expected_requests=_rate(problem) * served_s,
        gain_per_request=_less(today.keep.objective if not today.broken else math.inf, outcome.objective),
        net_gain=_less(today.keep.horizon_cost, cost),
        horizon_cost=cost,
    )


def _less(before: float, after: float) -> float:
    """before - after, where an infinite future gains nothing over an infinite present."""
    return before - after if math.isfinite(after) else (0.0 if not math.isfinite(before) else -math.inf)


def _outcome(problem: Problem, action: Action, placement: Placement, result: Evaluation) -> Alternative:
    return Alternative(
        action,
        placement,
        objective=result.objective,
        latency_s=result.terms.latency_s,
        shortfall_s=float(sum(slo_shortfall_s(problem, result).values())),
        violations=tuple(violation.text for violation in result.violations),
    )


def _broken(problem: Problem, result: Evaluation, placement: Placement) -> str:
    """Why the placement cannot serve at all, "" if it can. Exceeded limits count only at full load."""
    overloaded = [
        f"{node.name} is overloaded ({use:.2f})"
        for node, use in zip(problem.nodes, result.utilization, strict=True)
        if use >= 1 and node.name in placement
    ]
    kinds = ("privacy", "cannot_run", "link")
    return "; ".join([*overloaded, *(each.text for each in result.violations if each.kind in kinds)])


def _over(result: Evaluation) -> str:
    """The limits of memory and utilization that are exceeded by more than measurement noise, "" if none is."""
    return "; ".join(
        each.text
        for each in result.violations
        if (each.kind == "memory" and each.excess > SLACK * each.limit)
        or (each.kind == "utilization" and each.excess > SLACK)
    )


def _rate(problem: Problem) -> float:
    return sum(request_class.rate_rps for request_class in problem.classes)


def _cached_tokens(problem: Problem, result: Evaluation) -> float:
    """Tokens in the caches of the requests that run (Little's law), half of their new tokens made; at most what
    memory is reserved for."""
    mean = sum(
        request_class.rate_rps * latency * (request_class.prompt_tokens + request_class.new_tokens / 2)
        for request_class, latency in zip(problem.classes, result.class_latency_s, strict=True)
    )
    return float(min(mean, problem.kv_tokens)) if math.isfinite(mean) else problem.kv_tokens


def _transfer_s(
    problem: Problem, moved: Sequence[int], placement: Placement, cached_tokens: float, settings: Settings
) -> float:
    """Seconds until the last node has its new blocks: nodes load side by side, a node one thing after another.

    Weights come from the registry, caches from the node that had them (if it can still be reached).
    """
    assert problem.current is not None
    busy = dict.fromkeys(placement, 0.0)
    for j in moved:
        block, target = problem.blocks[j], placement[j]
        registry = settings.registry_bytes_per_s or _bandwidth(problem, problem.classes[0].source, target)
        caches = _bandwidth(problem, problem.current[j], target)
        busy[target] += block.weight_bytes / registry + block.kv_bytes_per_token * cached_tokens / caches
    return max(busy.values())


def _is_staged(problem: Problem, placement: Placement) -> bool:
    """Whether a node that gets blocks lacks the memory to hold them beside those that it has."""
    assert problem.current is not None
    for node in problem.nodes:
        places = list(zip(problem.blocks, problem.current, placement, strict=True))
        both = [block for block, *where in places if node.name in where]
        needed = sum(block.weight_bytes + problem.kv_tokens * block.kv_bytes_per_token for block in both)
        if needed > node.memory_bytes and any(new == node.name != old for _, old, new in places):
            return True
    return False


def _bandwidth(problem: Problem, source: str, target: str) -> float:
    """Bytes per second between two nodes; infinite within one, and where nothing can be sent at all."""
    names = [node.name for node in problem.nodes]
    if source == target or source not in names:
        return math.inf
    bandwidth = float(problem.link_bandwidth_bytes_per_s[names.index(source), names.index(target)])
    return math.inf if math.isnan(bandwidth) else bandwidth


def _round_trip_s(problem: Problem, moved: Sequence[int], placement: Placement) -> float:
    """The longest round trip between an old and a new holder: what is patched at the switch crosses it."""
    assert problem.current is not None
    names = [node.name for node in problem.nodes]
    pairs = {(problem.current[j], placement[j]) for j in moved if problem.current[j] in names}
    latencies = [float(problem.link_latency_s[names.index(old), names.index(new)]) for old, new in pairs]
    return 2 * max((latency for latency in latencies if math.isfinite(latency)), default=0.0)
