"""Keep, redistribute, re-split or roll back: the choice among priced alternatives, and its reason.

Pure: problem, measurements, history and time come in as values. Knows no cluster and deploys nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from resplit.decide.price import Action, Alternative, CurrentPlacement, price, price_current
from resplit.decide.state import History, Measured, PastMove, Placement, Settings
from resplit.errors import DataError
from resplit.planner import solve as default_solve
from resplit.types import Plan, Problem

__all__ = ["Decision", "NodeSeen", "decide"]

BEYOND_CHANCE = 2.0  # standard errors
Solve = Callable[..., Plan]


@dataclass(frozen=True)
class NodeSeen:
    """A node as the decision saw it."""

    name: str
    usable: bool
    memory_bytes: float
    background_utilization: float
    trusted: bool


@dataclass(frozen=True)
class Decision:
    """What was seen, what could be done at which price, and what is to be done and why.

    `chosen` is one of `alternatives`; `threshold` is the least gain per request that was asked for, relative to today's
    objective; `urgent` says why hysteresis was set aside, "" where it was not.
    """

    at_s: float
    chosen: Alternative
    reason: str
    urgent: str
    threshold: float
    uncertainty: float
    alternatives: tuple[Alternative, ...]
    nodes: tuple[NodeSeen, ...]
    rates_rps: dict[str, float]
    current: Placement
    measured: Measured | None

    @property
    def action(self) -> Action:
        """What is to be done."""
        return self.chosen.action

    @property
    def placement(self) -> Placement:
        """The placement to be live from now on: today's for keep."""
        assert self.chosen.placement is not None
        return self.chosen.placement

    def move(self, at_s: float) -> PastMove:
        """The move that this decision is, deployed at `at_s`, for `History.moved`."""
        keep = self.alternatives[0]
        could_go_on = math.isfinite(keep.horizon_cost)
        before = self.measured if could_go_on else None
        return PastMove(
            at_s,
            self.action,
            self.current,
            self.placement,
            latency_before_s=before.latency_s if before else None,
            predicted_before_s=keep.latency_s,
            error_before_s=before.error_s if before else 0.0,
        )

    def to_json(self) -> str:
        """The decision as one JSON object; what is infinite or unknown is null."""
        return json.dumps(_plain(asdict(self) | {"action": self.action}))


def decide(
    problem: Problem,
    *,
    now_s: float,
    settings: Settings,
    history: History,
    uncertainty: float = 0.0,
    measured: Measured | None = None,
    solve: Solve = default_solve,
) -> Decision:
    """What to do about today's placement `problem.current` under the fresh `problem` (equations 8 and 9).

    Keeping is priced against the best redistribution (today's cuts) and the best re-split (any cut). The best net gain
    wins if it is above 0, its gain per request above the threshold, the cooldown over and the move not barred. A
    placement that cannot go on (lost node, broken privacy, overload) is left at once for the best legal one, one that
    exceeds a limit of memory or use once the cooldown is over; a missed objective sets the cooldown aside; a move that
    made things worse is undone. DataError without a current placement.
    """
    if problem.current is None:
        raise DataError("nothing is placed yet: there is nothing to decide about, make a first plan")
    today = price_current(problem, settings)
    options = tuple(_planned(problem, action, today, settings, solve) for action in ("redistribute", "re-split"))
    undone = _undoing(problem, today, settings, history, measured, now_s)
    threshold = settings.threshold + settings.uncertainty_weight * uncertainty
    if undone is not None:
        options = (*options, undone)
        chosen, reason, urgent = undone, _worse(undone, history, measured), "the last move made things worse"
    elif today.broken:
        chosen, reason = _escape(today, options)
        urgent = today.broken
    else:
        urgent = _missed(today, options, measured, threshold)
        chosen, reason = _best(today, options, settings, history, threshold, now_s, hurry=bool(urgent))
    return Decision(
        now_s,
        chosen,
        reason,
        urgent,
        threshold,
        uncertainty,
        (today.keep, *options),
        _seen(problem),
        {request_class.name: request_class.rate_rps for request_class in problem.classes},
        problem.current,
        measured,
    )


def _planned(
    problem: Problem, action: Action, today: CurrentPlacement, settings: Settings, solve: Solve
) -> Alternative:
    """The best plan of this kind, priced; one that is not legal counts as none."""
    assert problem.current is not None
    cuts = frozenset(b for b in range(1, len(problem.blocks)) if problem.current[b - 1] != problem.current[b])
    plan = solve(
        replace(problem, allowed_cuts=cuts) if action == "redistribute" else problem,
        solver=settings.solver,
        time_limit_s=settings.time_limit_s,
        work_limit=settings.work_limit,
        tolerance=settings.tolerance,
    )
    if plan.placement is None:
        return Alternative(action, None, lower_bound=plan.lower_bound, reason=plan.reason or plan.status)
    priced = replace(price(problem, action, plan.placement, today, settings), lower_bound=plan.lower_bound)
    if priced.violations:
        return replace(priced, placement=None, reason="; ".join(priced.violations))
    return priced


def _undoing(
    problem: Problem,
    today: CurrentPlacement,
    settings: Settings,
    history: History,
    measured: Measured | None,
    now_s: float,
) -> Alternative | None:
    """Going back to where the last move came from, where that is legal and due."""
    last = history.last
    if last is None or last.action == "rollback" or last.after != problem.current or measured is None:
        return None
    if now_s > last.at_s + settings.trial_s or measured.requests < settings.trial_requests:
        return None
    if set(last.before) - {node.name for node in problem.nodes}:
        return None
    back = price(problem, "rollback", last.before, today, settings)
    expected_s = _without_move_s(last, back)
    if expected_s is None or back.violations:
        return None
    error_s = math.hypot(measured.error_s, last.error_before_s * back.latency_s / last.predicted_before_s)
    worse_s = measured.latency_s - (1 + settings.rollback_margin) * expected_s
    return back if worse_s > BEYOND_CHANCE * error_s else None


def _without_move_s(last: PastMove, back: Alternative) -> float | None:
    """What requests would take now without the last move: as measured before it, changed as the price of the old
    placement has since. So neither a surge of load nor a model that is off by a factor undoes a good move."""
    if last.latency_before_s is None or not math.isfinite(back.latency_s):
        return None
    return last.latency_before_s * back.latency_s / last.predicted_before_s


def _escape(today: CurrentPlacement, options: tuple[Alternative, ...]) -> tuple[Alternative, str]:
    """The legal alternative that costs least over the horizon, the move included."""
    legal = [option for option in options if option.placement is not None]
    if not legal:
        whys = "; ".join(f"{option.action}: {option.reason}" for option in options)
        return today.keep, f"today's placement cannot go on ({today.broken}), but nothing else can be done: {whys}"
    best = min(legal, key=lambda option: option.horizon_cost)
    return best, f"today's placement cannot go on ({today.broken}); {_told(best)}"


def _best(
    today: CurrentPlacement,
    options: tuple[Alternative, ...],
    settings: Settings,
    history: History,
    threshold: float,
    now_s: float,
    hurry: bool,
) -> tuple[Alternative, str]:
    """The alternative with the best net gain that nothing speaks against; keep, with what spoke against the best.

    Where today's placement exceeds a limit, an alternative need not gain anything.
    """
    legal = [option for option in options if option.placement is not None and (today.over or option.net_gain > 0)]
    if not legal:
        limit = f", though {today.over}" if today.over else ""
        return today.keep, f"no alternative gains more than its move costs{limit}"
    rejected = ""
    for option in sorted(legal, key=lambda option: -option.net_gain):
        against = _against(option, today, settings, history, threshold, now_s, hurry)
        if not against:
            return option, f"{today.over}; {_told(option)}" if today.over else _told(option)
        rejected = rejected or f"{_told(option)}, but {against}"
    return today.keep, rejected


def _against(
    option: Alternative,
    today: CurrentPlacement,
    settings: Settings,
    history: History,
    threshold: float,
    now_s: float,
    hurry: bool,
) -> str:
    """What speaks against an alternative; "" if nothing."""
    assert option.placement is not None
    if history.bars(option.placement, now_s):
        return "this move was undone lately"
    if not today.over and not option.gain_per_request > threshold * today.keep.objective:
        return f"the gain per request is within the threshold of {threshold:.1%}"
    if history.last is not None and not hurry and now_s < history.last.at_s + settings.cooldown_s:
        return f"the last move was {now_s - history.last.at_s:.0f} s ago"
    return ""


def _missed(
    today: CurrentPlacement, options: tuple[Alternative, ...], measured: Measured | None, threshold: float
) -> str:
    """That an objective is missed, measured or predicted beyond doubt, where an alternative misses it by less."""
    predicted = today.keep.shortfall_s > threshold * today.keep.latency_s
    if not predicted and not (measured and measured.slo_missed):
        return ""
    if all(option.placement is None or option.shortfall_s >= today.keep.shortfall_s for option in options):
        return ""  # nothing can be won by hurrying
    return "a service objective is missed" + (f" ({', '.join(measured.slo_missed)})" if measured else "")


def _worse(undone: Alternative, history: History, measured: Measured | None) -> str:
    assert measured is not None
    assert history.last is not None
    return (
        f"since the last move ({history.last.action}) requests take {measured.latency_s:.3f} s, without it they would "
        f"take {_without_move_s(history.last, undone) or 0:.3f} s: back to the placement before it"
    )


def _told(option: Alternative) -> str:
    gain = "" if math.isinf(option.gain_per_request) else f", {option.gain_per_request:.3f} less per request"
    return (
        f"{option.action} promises {option.latency_s:.3f} s{gain}, for {option.weight_bytes / 1e6:.0f} MB of weights "
        f"and {option.cache_bytes / 1e6:.1f} MB of caches in {option.transfer_s:.1f} s"
    )


def _seen(problem: Problem) -> tuple[NodeSeen, ...]:
    usable = ~(problem.prefill_s_per_token != problem.prefill_s_per_token).all(axis=0)  # NaN is unlike itself
    return tuple(
        NodeSeen(node.name, bool(can), node.memory_bytes, node.background_utilization, node.trusted)
        for node, can in zip(problem.nodes, usable, strict=True)
    )


def _plain(value: object) -> object:
    """What JSON can say of a value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
