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
    sentences += ["It stays." if chosen.action == "keep" else _move(chosen)]
    outcome = decision.outcome
    if outcome and outcome.refused:
        sentences.append(f"It was refused: {outcome.refused}.")
    if outcome and outcome.brought:
        sentences.append(_brought(outcome.brought, chosen))
    return sentences


def _seen(decision: Decision) -> list[str]:
    """What was seen, and how sure that is: two standard deviations, or the error of the cost model alone."""
    if not decision.seen:
        return (
            [f"It looked at a tick; the cost model is off by {decision.uncertainty:.0%}."]
            if decision.uncertainty
            else []
        )
    pairs = zip(decision.seen, decision.deviations or (math.nan,) * len(decision.seen), strict=False)
    said = [what if math.isnan(deviation) else f"{what} (± {2 * deviation:.0%})" for what, deviation in pairs]
    return [f"It saw that {'; '.join(said)}."]


def _staying(keep: Alternative) -> str:
    if not math.isfinite(keep.latency_s):
        return "If it stayed, requests could not be served."
    return f"If it stayed, a request would take {keep.latency_s:.2f} s."


def _move(chosen: Alternative) -> str:
    moved_bytes = chosen.weight_bytes + chosen.cache_bytes
    gain = f" and saves {chosen.net_gain:.1f} over the horizon" if math.isfinite(chosen.net_gain) else ""
    return (
        f"The move ({chosen.action}) costs {moved_bytes / 1e6:.0f} MB and a pause of {chosen.pause_s * 1e3:.0f} ms, "
        f"promises {chosen.latency_s:.2f} s{gain}."
    )


def _brought(brought: Brought, chosen: Alternative) -> str:
    before = f" instead of {brought.latency_before_s:.2f} s before it" if brought.latency_before_s is not None else ""
    return (
        f"It brought {brought.latency_s:.2f} s over {brought.requests} requests{before}; "
        f"{chosen.latency_s:.2f} s were promised."
    )
