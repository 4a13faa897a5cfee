"""The adaptive orchestrator: chooses one action for each control tick (section III-C 3, equations 8 and 9).

Equation 8 asks whether another placement under the current cuts would be better (redistribute), equation 9 whether
other cuts would (re-split). Four kinds of hysteresis keep noise from causing moves: threshold, cooldown, trial and bar
(docs/adr/0004-decide.md). These invariants hold for every decision:

- The chosen placement violates no constraint, or it is the current one. Where no plan keeps the ceilings on
  utilisation, they rise, for the current placement too, and the reason says so.
- An optional move has a net gain above 0 and a gain per request above the threshold, unless the current placement
  exceeds a limit of memory or use. Ties go to keep.
- Within the cooldown the placement changes only if the current one is broken, if an alternative reduces a missed
  service objective, or to roll back a move whose trial failed.
- A placement that was rolled back is not chosen while it is barred, unless the current one is broken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from resplit.decide.decision import Decision, NodeConditions
from resplit.decide.price import Action, Alternative, CurrentPlacement, is_staged, price, price_current
from resplit.decide.state import NOTHING_READY, History, Measured, PastMove, Placement, Ready, Settings
from resplit.errors import DataError
from resplit.planner import solve as default_solve
from resplit.planner.best_effort import ceilings_note, under_higher_ceilings
from resplit.planner.evaluate import evaluate
from resplit.types import Plan, Problem

__all__ = ["decide", "node_conditions"]

MIN_STANDARD_ERRORS = 2.0  # a smaller excess of latency may be chance, so it does not fail a trial
Solve = Callable[..., Plan]
_SHIFTS = (-4, -3, -2, -1, 1, 2, 3, 4)  # of a cut, in blocks
_MOST_SHIFTS = 8  # one after the other


def decide(
    problem: Problem,
    *,
    now_s: float,
    settings: Settings,
    history: History,
    uncertainty: float = 0.0,
    measured: Measured | None = None,
    ready: Ready = NOTHING_READY,
    solve: Solve = default_solve,
) -> Decision:
    """Decide about the current placement `problem.current` under the present state `problem`.

    `uncertainty` is the relative error of the cost model that posed the problem; `measured` are the requests since the
    last move, `ready` is what was prepared for likely changes. `solve` makes the plans (the signature is that of
    `resplit.planner.solve`). DataError if nothing is placed yet.
    """
    if problem.current is None:
        raise DataError("there is no current placement to decide about: deploy a first plan")
    priced = _best_effort(problem, settings, ready, solve)
    current, plans = priced.current, priced.plans
    rollback = _failed_trial_rollback(priced.problem, current, settings, history, measured, now_s)
    hysteresis = _Hysteresis(settings, history, now_s, settings.threshold + settings.uncertainty_weight * uncertainty)
    choice = _choose(rollback, current, plans, history, measured, hysteresis)
    note = _ceilings_exceeded(problem, priced, choice.chosen)
    return Decision(
        at_s=now_s,
        action=choice.chosen.action,
        reason="; ".join(filter(None, [choice.reason, note])),
        note=note,
        chosen=choice.chosen,
        urgent=choice.urgent,
        threshold=hysteresis.threshold,
        uncertainty=uncertainty,
        alternatives=(current.keep, *plans, *([rollback] if rollback else [])),
        nodes=node_conditions(problem),
        rates_rps={request_class.name: request_class.rate_rps for request_class in problem.classes},
        current=problem.current,
        measured=measured,
    )


@dataclass(frozen=True)
class _Priced:
    """The current placement and the best plans, priced under `problem`."""

    problem: Problem
    current: CurrentPlacement
    plans: list[Alternative]

    @property
    def has_plan(self) -> bool:
        """Whether any plan was found."""
        return any(plan.placement is not None for plan in self.plans)


def _priced(problem: Problem, settings: Settings, ready: Ready, solve: Solve) -> _Priced:
    current = price_current(problem, settings)
    plans = [_best_plan(problem, action, current, settings, ready, solve) for action in ("redistribute", "re-split")]
    return _Priced(problem, current, plans)


def _best_effort(problem: Problem, settings: Settings, ready: Ready, solve: Solve) -> _Priced:
    """What is priced under `problem`, or under higher ceilings if no plan keeps its ceilings and one keeps those."""

    def if_planned(posed: Problem) -> _Priced | None:
        priced = _priced(posed, settings, ready, solve)
        return priced if priced.has_plan else None

    priced = _priced(problem, settings, ready, solve)
    return priced if priced.has_plan else under_higher_ceilings(problem, if_planned) or priced


def _choose(
    rollback: Alternative | None,
    current: CurrentPlacement,
    plans: list[Alternative],
    history: History,
    measured: Measured | None,
    hysteresis: _Hysteresis,
) -> _Decided:
    """A failed trial comes first, then a placement that violates a constraint, then the net gain."""
    if rollback is not None:
        return _choose_rollback(rollback, current, history, measured)
    if current.broken:
        return _choose_escape(current, plans)
    return _choose_by_net_gain(current, plans, measured, hysteresis)


def _ceilings_exceeded(problem: Problem, priced: _Priced, chosen: Alternative) -> str:
    """A note on the ceilings of `problem` that `chosen` exceeds, if no plan keeps them; "" otherwise."""
    names = [node.name for node in problem.nodes]
    if priced.problem is problem or chosen.placement is None or set(chosen.placement) - set(names):
        return ""
    utilization = evaluate(problem, chosen.placement).utilization.tolist()
    return ceilings_note(problem, dict(zip(names, utilization, strict=True)))


@dataclass(frozen=True)
class _Decided:
    """An alternative, the reason for it, and why the cooldown was waived ("" if it was not)."""

    chosen: Alternative
    reason: str
    urgent: str = ""


@dataclass(frozen=True)
class _Hysteresis:
    """The conditions that an optional move must satisfy. `threshold` is relative to the current objective."""

    settings: Settings
    history: History
    now_s: float
    threshold: float

    def objection(self, option: Alternative, current: CurrentPlacement, waive_cooldown: bool) -> str:
        """Why `option` must not be chosen now; "" if it may be."""
        assert option.placement is not None
        if self.history.bars(option.placement, self.now_s):
            return "it was rolled back recently"
        if not current.exceeded and option.gain_per_request <= self.threshold * current.keep.objective:
            return f"the gain per request is within the threshold of {self.threshold:.1%}"
        if not waive_cooldown and self._in_cooldown():
            return f"the last move was {self.now_s - self._last_move_s:.0f} s ago"
        return ""

    def _in_cooldown(self) -> bool:
        return self.now_s < self._last_move_s + self.settings.cooldown_s

    @property
    def _last_move_s(self) -> float:
        return self.history.last.at_s if self.history.last else -math.inf


def _best_plan(
    problem: Problem, action: Action, current: CurrentPlacement, settings: Settings, ready: Ready, solve: Solve
) -> Alternative:
    """The best plan with the current cuts (redistribute) or with any cuts (re-split), priced.

    The move of a plan may be staged, for lack of memory: all requests wait meanwhile. Then its cuts are shifted as long
    as that costs less over the horizon, the move included. A placement that is ready is better if it costs less.
    Without a plan, or if the plan violates a constraint, `placement` is None and `reason` says why.
    """
    assert problem.current is not None
    cuts = _cuts(problem.current)
    starts = [each for each in ready.placements if action == "re-split" or _cuts(each) <= cuts]
    seeded = partial(
        solve,
        solver=settings.solver,
        time_limit_s=settings.time_limit_s,
        work_limit=settings.work_limit,
        tolerance=settings.tolerance,
        **({"starts": starts} if starts else {}),
    )
    posed = replace(problem, allowed_cuts=cuts) if action == "redistribute" else problem
    plan = seeded(posed)
    found = [*([plan.placement] if plan.placement is not None else []), *starts]
    if not found:
        return Alternative(action, None, lower_bound=plan.lower_bound, reason=plan.reason or plan.status)
    price_of = partial(_price, problem, action, current, settings, ready)
    priced = [price_of(each) for each in found]
    if action == "re-split" and current.stalled < 1 and is_staged(problem, found[0]) and not priced[0].violations:
        priced.append(_with_shifted_cuts(priced[0], price_of))
    legal = [each for each in priced if not each.violations]
    if not legal:
        return replace(priced[0], placement=None, lower_bound=plan.lower_bound, reason="; ".join(priced[0].violations))
    return replace(min(legal, key=lambda each: each.horizon_cost), lower_bound=plan.lower_bound)


def _price(
    problem: Problem,
    action: Action,
    current: CurrentPlacement,
    settings: Settings,
    ready: Ready,
    placement: Placement,
) -> Alternative:
    return price(problem, action, placement, current, settings, ready)


def _with_shifted_cuts(option: Alternative, price_of: Callable[[Placement], Alternative]) -> Alternative:
    """The best one to which shifts of cuts lead, each of which costs less than the one before."""
    for _ in range(_MOST_SHIFTS):
        assert option.placement is not None
        options = [each for each in map(price_of, _shifts(option.placement)) if not each.violations]
        best = min(options, key=lambda each: each.horizon_cost, default=option)
        if best.horizon_cost >= option.horizon_cost:
            break
        option = best
    return option


def _shifts(placement: Placement) -> Iterator[Placement]:
    """The placements in which a cut, or both cuts of a segment, are shifted by a few blocks."""
    ends = [*sorted(_cuts(placement)), len(placement)]
    hosts = [placement[end - 1] for end in ends]
    for first, last in [*((i, i) for i in range(len(ends) - 1)), *((i, i + 1) for i in range(len(ends) - 2))]:
        for by in _SHIFTS:
            shifted = [end + by if first <= place <= last else end for place, end in enumerate(ends)]
            lengths = [end - begin for begin, end in itertools.pairwise([0, *shifted])]
            if min(lengths) > 0:
                yield tuple(host for host, length in zip(hosts, lengths, strict=True) for _ in range(length))


def _cuts(placement: Placement) -> frozenset[int]:
    return frozenset(b for b in range(1, len(placement)) if placement[b - 1] != placement[b])


def _failed_trial_rollback(
    problem: Problem,
    current: CurrentPlacement,
    settings: Settings,
    history: History,
    measured: Measured | None,
    now_s: float,
) -> Alternative | None:
    """The priced rollback of the last move; None if its trial did not fail or the placement before it is not legal."""
    last = history.last
    if last is None or measured is None or not _on_trial(last, problem, settings, measured, now_s):
        return None
    if set(last.before) - {node.name for node in problem.nodes}:
        return None
    back = price(problem, "rollback", last.before, current, settings)
    expected_s = _latency_without_move_s(last, back, current, measured)
    if expected_s is None or back.violations:
        return None
    error_s = math.hypot(measured.error_s, last.error_before_s * back.latency_s / last.predicted_before_s)
    excess_s = measured.latency_s - (1 + settings.rollback_margin) * expected_s
    return back if excess_s > MIN_STANDARD_ERRORS * error_s else None


def _on_trial(last: PastMove, problem: Problem, settings: Settings, measured: Measured, now_s: float) -> bool:
    """Whether the last move can still be judged: its placement is live, its trial runs, and enough requests ended."""
    return (
        last.action != "rollback"
        and last.after == problem.current
        and now_s <= last.at_s + settings.trial_s
        and measured.requests >= settings.trial_requests
    )


def _latency_without_move_s(
    last: PastMove, back: Alternative, current: CurrentPlacement, measured: Measured
) -> float | None:
    """The latency that requests would have now without the last move; None if none was measured before it.

    It is the latency measured before the move, times the price of the old placement now over its price then. So a
    surge of load does not undo a good move, and a constant factor in the cost model cancels. Close to full load a price
    is far above what requests take for some seconds. So it is not less than the price now, by as much as requests now
    take less than their price.
    """
    if last.latency_before_s is None or not math.isfinite(back.latency_s):
        return None
    least_s = back.latency_s * min(1.0, measured.latency_s / current.keep.latency_s)
    return max(least_s, last.latency_before_s * back.latency_s / last.predicted_before_s)


def _choose_rollback(
    rollback: Alternative, current: CurrentPlacement, history: History, measured: Measured | None
) -> _Decided:
    assert measured is not None
    assert history.last is not None
    expected_s = _latency_without_move_s(history.last, rollback, current, measured) or 0.0
    reason = (
        f"since the last move ({history.last.action}) requests take {measured.latency_s:.3f} s; without it they would "
        f"take {expected_s:.3f} s: back to the placement before it"
    )
    return _Decided(rollback, reason, "the last move made latency worse")


def _choose_escape(current: CurrentPlacement, plans: list[Alternative]) -> _Decided:
    """The legal plan with the least cost over the horizon, the move included. Gains and hysteresis do not count."""
    legal = [plan for plan in plans if plan.placement is not None]
    broken = f"the current placement cannot serve ({current.broken})"
    if not legal:
        reasons = "; ".join(f"{plan.action}: {plan.reason}" for plan in plans)
        return _Decided(current.keep, f"{broken}, and there is no alternative: {reasons}", current.broken)
    best = min(legal, key=lambda plan: plan.horizon_cost)
    return _Decided(best, f"{broken}; {_summary(best)}", current.broken)


def _choose_by_net_gain(
    current: CurrentPlacement, plans: list[Alternative], measured: Measured | None, hysteresis: _Hysteresis
) -> _Decided:
    """The plan with the highest net gain to which hysteresis has no objection; keep if there is none.

    If the current placement exceeds a limit, a plan need not gain anything.
    """
    urgent = _missed_objective(current, plans, measured, hysteresis.threshold)
    useful = [plan for plan in plans if plan.placement is not None and (current.exceeded or plan.net_gain > 0)]
    if not useful:
        limit = f", although {current.exceeded}" if current.exceeded else ""
        return _Decided(current.keep, f"no alternative gains more than its move costs{limit}", urgent)
    objections = []
    for plan in sorted(useful, key=lambda plan: -plan.net_gain):
        objection = hysteresis.objection(plan, current, waive_cooldown=bool(urgent))
        if not objection:
            reason = f"{current.exceeded}; {_summary(plan)}" if current.exceeded else _summary(plan)
            return _Decided(plan, reason, urgent)
        objections.append(f"{_summary(plan)}, but {objection}")
    return _Decided(current.keep, objections[0], urgent)


def _missed_objective(
    current: CurrentPlacement, plans: list[Alternative], measured: Measured | None, threshold: float
) -> str:
    """Why the cooldown is waived: a service objective is missed, and some plan misses it by less. "" if not.

    An objective is missed if requests missed it, or if the predicted shortfall exceeds the threshold, relative to the
    latency.
    """
    predicted = current.keep.shortfall_s > threshold * current.keep.latency_s
    names = measured.slo_missed if measured else ()
    if not predicted and not names:
        return ""
    if all(plan.placement is None or plan.shortfall_s >= current.keep.shortfall_s for plan in plans):
        return ""
    return "a service objective is missed" + (f" ({', '.join(names)})" if names else "")


def _summary(option: Alternative) -> str:
    gain = "" if math.isinf(option.gain_per_request) else f", {option.gain_per_request:.3f} less per request"
    return (
        f"{option.action} promises {option.latency_s:.3f} s{gain}, for {option.weight_bytes / 1e6:.0f} MB of weights "
        f"and {option.cache_bytes / 1e6:.1f} MB of caches in {option.transfer_s:.1f} s"
    )


def node_conditions(problem: Problem) -> tuple[NodeConditions, ...]:
    """The nodes of `problem`, as a decision about it records them."""
    return tuple(
        NodeConditions(
            node.name,
            usable=bool(np.isfinite(times_s).any()),
            memory_bytes=node.memory_bytes,
            background_utilization=node.background_utilization,
            trusted=node.trusted,
        )
        for node, times_s in zip(problem.nodes, problem.prefill_s_per_token.T, strict=True)
    )
