"""The report's tables of decisions and recoveries, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resplit.decide import Alternative, Decision, in_words
from resplit.epochs import RECOVER

__all__ = ["AlternativeText", "DecisionText", "decision_text", "recovery_rows"]

BUSY = 0.1  # least background utilisation of a node that is mentioned


@dataclass(frozen=True)
class AlternativeText:
    """An alternative as one line of a list."""

    action: str
    text: str
    chosen: bool


@dataclass(frozen=True)
class DecisionText:
    """A decision as a row of the table: the state, the alternatives, the choice and its reason."""

    at_s: float
    action: str
    seen: list[str]
    alternatives: list[AlternativeText]
    reason: str
    words: list[str]


def decision_text(decision: Decision) -> DecisionText:
    """One entry of the decision log as a row."""
    return DecisionText(
        at_s=decision.at_s,
        action=decision.action,
        seen=_seen(decision),
        alternatives=[
            AlternativeText(option.action, _price(option), option.action == decision.action)
            for option in decision.alternatives
        ],
        reason="; ".join(text for text in (decision.urgent, decision.reason) if text),
        words=in_words(decision),
    )


def recovery_rows(decisions: Sequence[Decision]) -> list[dict[str, str]]:
    """The parts of each recovery from a loss, in order of time. Times of sessions are the longest of all sessions."""
    return [
        {
            "reason": decision.reason,
            "sessions": str(sessions.sessions),
            "noticed": _ms(sessions.noticed_s),
            "plan": _ms(outcome.plan_s),
            "load": _ms(outcome.prepare_s),
            "restore": _ms(sessions.restore_s),
            "replay": _ms(sessions.replay_s),
            "positions restored": str(sessions.restored_positions),
            "positions replayed": str(sessions.replayed_positions),
            "MB transferred": f"{sessions.cache_bytes / 1e6:.1f}",
        }
        for decision in decisions
        if decision.action == RECOVER and (outcome := decision.outcome) and (sessions := outcome.sessions)
    ]


def _seen(decision: Decision) -> list[str]:
    lines = []
    if decision.rates_rps:
        lines.append("load " + ", ".join(f"{name} {rate:.2f}/s" for name, rate in decision.rates_rps.items()))
    if measured := decision.measured:
        lines.append(f"latency {_ms(measured.latency_s)} over {measured.requests} requests")
        if measured.slo_missed:
            lines.append(f"objective missed: {', '.join(measured.slo_missed)}")
    lines += [
        f"others use {100 * node.background_utilization:.0f} % of {node.name}"
        for node in decision.nodes
        if node.usable and node.background_utilization >= BUSY
    ]
    lost = [node.name for node in decision.nodes if not node.usable]
    return lines + ([f"lost: {', '.join(lost)}"] if lost else [])


def _price(option: Alternative) -> str:
    if option.placement is None:
        return f"not possible: {option.reason or 'no plan'}"
    text = f"{_ms(option.latency_s)}, net gain {_number(option.net_gain)}"
    moved_bytes = option.weight_bytes + option.cache_bytes
    return f"{text}, moves {moved_bytes / 1e6:.0f} MB, pause {_ms(option.pause_s)}" if moved_bytes else text


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e3:.0f} ms" if math.isfinite(seconds) else "unbounded"


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "unbounded"
