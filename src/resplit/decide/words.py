"""A decision in words: what was seen and how sure it is, what staying would have cost, what the move promises."""

from __future__ import annotations

import math

from resplit.decide.decision import Brought, Decision
from resplit.decide.price import Alternative

__all__ = ["in_words"]


def in_words(decision: Decision) -> list[str]:
    """Some sentences about a decision, and about what a move brought once that was measured.

    They say nothing about entries that have no alternatives, such as recoveries.
    """
    if not decision.alternatives or decision.chosen is None:
        return []
    keep, chosen = decision.alternatives[0], decision.chosen
    sentences = [*_seen(decision), _staying(keep)]
    if chosen.action == "keep":
        sentences += [f"It stays: {decision.reason}.", *_declined(decision)]
    else:
        sentences.append(f"The move ({chosen.action}) {_price(chosen)}.")
    outcome = decision.outcome
    if outcome and outcome.refused:
        sentences.append(f"It was refused: {outcome.refused}.")
    if outcome and outcome.brought:
        sentences.append(_brought(outcome.brought, chosen))
    return sentences


def _seen(decision: Decision) -> list[str]:
    """What was seen, and how sure that is: two standard deviations, or the error of the cost model alone."""
    if not decision.seen:
        return _measured(decision)
    pairs = zip(decision.seen, decision.deviations or (math.nan,) * len(decision.seen), strict=False)
    said = [what if math.isnan(deviation) else f"{what} (± {2 * deviation:.0%})" for what, deviation in pairs]
    return [f"It saw that {'; '.join(said)}."]


def _measured(decision: Decision) -> list[str]:
    """What a tick saw: the requests since the last move, and the error of the cost model."""
    sentences, measured = [], decision.measured
    if measured is not None:
        missed = f"; {', '.join(measured.slo_missed)} missed the objective" if measured.slo_missed else ""
        took = f"{measured.latency_s:.2f} s (± {2 * measured.error_s:.2f} s)"
        sentences.append(f"It looked at a tick: {measured.requests} requests took {took}{missed}.")
    if decision.uncertainty:
        sentences.append(f"The cost model is off by {decision.uncertainty:.0%}.")
    return sentences


def _declined(decision: Decision) -> list[str]:
    """The best alternative of a decision to keep, unless no other placement is better."""
    plans = [plan for plan in decision.alternatives[1:] if plan.placement not in (None, decision.current)]
    if not plans:
        return []
    best = max(plans, key=lambda plan: plan.net_gain)
    return [f"The best alternative ({best.action}) {_price(best)}."]


def _staying(keep: Alternative) -> str:
    if not math.isfinite(keep.latency_s):
        return "If it stayed, requests could not be served."
    return f"If it stayed, a request would take {keep.latency_s:.2f} s."


def _price(option: Alternative) -> str:
    """What a move costs and promises."""
    moved_bytes = option.weight_bytes + option.cache_bytes
    gain = ""
    if math.isfinite(option.net_gain):
        verb = "saves" if option.net_gain >= 0 else "loses"
        gain = f" and {verb} {abs(option.net_gain):.1f} over the horizon"
    return (
        f"costs {moved_bytes / 1e6:.0f} MB and a pause of {option.pause_s * 1e3:.0f} ms, "
        f"promises {option.latency_s:.2f} s{gain}"
    )


def _brought(brought: Brought, chosen: Alternative) -> str:
    before = f" instead of {brought.latency_before_s:.2f} s before it" if brought.latency_before_s is not None else ""
    return (
        f"It brought {brought.latency_s:.2f} s over {brought.requests} requests{before}; "
        f"{chosen.latency_s:.2f} s were promised."
    )
