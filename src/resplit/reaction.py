"""How soon a policy reacts to changes, and how often it is alarmed without one, from the record of a run.

A change is counted where a policy that knows the scenario moves, too. Time begins at the end of the first pass that the
change touched: the first token that left afterwards over the route that was live, if that has the changed node or link.
It begins at the change itself if the route has neither, or was left before such a token. Losses, returns and surges of
load are in rows of their own: there time begins at the event.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from resplit.decide import Decision
from resplit.epochs import RECOVER
from resplit.records import RunRecord

__all__ = [
    "CHANGE",
    "LOSS",
    "RETURN",
    "SURGE",
    "Reaction",
    "event_reactions",
    "false_alarms",
    "phase_label",
    "reactions",
]

CHANGE, LOSS, RETURN, SURGE = "change", "loss", "return", "surge"
EXPLAINED_S = 10.0  # an alarm so long after a change of its subject is not false
_CLOCK_S = 1e-3  # decisions and epochs are written with times of one clock, that are read one after the other
_ALARMED = ("resplit",)  # policies that are asked at detected changes


@dataclass(frozen=True)
class Reaction:
    """The reaction to one change: seconds until it was noticed, decided on, and live; NaN where that did not happen.

    `subjects` are the nodes and links that changed, `from_s` is the moment from which time counts, `what` one of
    `CHANGE`, `LOSS`, `RETURN` and `SURGE`.
    """

    subjects: tuple[str, ...]
    from_s: float
    noticed_s: float
    decided_s: float
    live_s: float
    what: str = CHANGE


def phase_label(what: str, subjects: Sequence[str]) -> str:
    """The label of a row of kind "phase" in the table of events. A link is written `one/other`."""
    return f"{what}: {' '.join(subjects)}"


def reactions(record: RunRecord) -> list[Reaction]:
    """The reactions to the counted changes, in order."""
    foreseen = set(_events(record, "foreseen").time_s)
    return [
        _reaction(record, phase, end_s)
        for phase, end_s in _with_ends(record)
        if phase.what == CHANGE and phase.at_s in foreseen
    ]


def event_reactions(record: RunRecord) -> list[Reaction]:
    """The reactions to losses, returns and surges, in order: the first decision that is not to keep, or that names it.

    What is live is the first epoch after the event, recoveries included.
    """
    return [_event_reaction(record, phase, end_s) for phase, end_s in _with_ends(record) if phase.what != CHANGE]


def false_alarms(record: RunRecord) -> tuple[float, float]:
    """The number of detected changes that no change of the scenario explains, and the seconds in which they counted.

    Both are NaN for a policy that is not asked at detected changes.
    """
    if record.policy not in _ALARMED:
        return math.nan, math.nan
    phases = _phases(record)
    alarms = [(decision.at_s, seen) for decision in record.decisions for seen in decision.seen]
    explained = [any(phase.explains(at_s, seen) for phase in phases) for at_s, seen in alarms]
    return float(len(explained) - sum(explained)), record.duration_s


@dataclass(frozen=True)
class _RecordedPhase:
    at_s: float
    what: str
    subjects: tuple[str, ...]

    def explains(self, at_s: float, seen: str) -> bool:
        if not 0.0 <= at_s - self.at_s <= EXPLAINED_S:
            return False
        return self.what in (LOSS, RETURN) or any(_mentions(seen, subject) for subject in self.subjects)


def _phases(record: RunRecord) -> list[_RecordedPhase]:
    rows = _events(record, "phase")
    parts = [str(label).partition(": ") for label in rows.label]
    return [
        _RecordedPhase(at_s, what, tuple(subjects.split()))
        for at_s, (what, _, subjects) in zip(rows.time_s.tolist(), parts, strict=True)
    ]


def _with_ends(record: RunRecord) -> list[tuple[_RecordedPhase, float]]:
    phases = _phases(record)
    return list(zip(phases, [*(phase.at_s for phase in phases[1:]), record.duration_s], strict=False))


def _event_reaction(record: RunRecord, phase: _RecordedPhase, end_s: float) -> Reaction:
    first = next(
        (
            made
            for made in _decisions(record, phase.at_s, end_s)
            if made.action == RECOVER or _is_about(made, phase.subjects or (phase.what,))
        ),
        None,
    )
    epochs = record.epochs[record.epochs.action != "initial"].time_s
    live_s = float(epochs[(epochs >= phase.at_s) & (epochs < end_s)].min())
    planned_s = (first.outcome.plan_s if first and first.outcome else None) or 0.0
    noticed_s = first.at_s - phase.at_s if first else math.nan
    return Reaction(phase.subjects, phase.at_s, noticed_s, noticed_s + planned_s, live_s - phase.at_s, phase.what)


def _reaction(record: RunRecord, phase: _RecordedPhase, end_s: float) -> Reaction:
    subjects, from_s = phase.subjects, _first_touched_s(record, phase.at_s, end_s, phase.subjects)
    first = next((d for d in _decisions(record, phase.at_s, end_s) if _is_about(d, subjects)), None)
    if first is None:
        return Reaction(subjects, from_s, math.nan, math.nan, math.nan)
    planned_s = (first.outcome.plan_s if first.outcome else None) or 0.0
    epochs = record.epochs[~record.epochs.action.isin(["initial", RECOVER])].time_s
    live_s = float(epochs[(epochs >= first.at_s - _CLOCK_S) & (epochs < end_s)].min())

    def after_s(at_s: float) -> float:  # a policy that knows the scenario does not wait for the first pass
        return max(0.0, at_s - from_s) if math.isfinite(at_s) else math.nan

    return Reaction(subjects, from_s, after_s(first.at_s), after_s(first.at_s + planned_s), after_s(live_s))


def _decisions(record: RunRecord, from_s: float, until_s: float) -> list[Decision]:
    made = [decision for decision in record.decisions if from_s <= decision.at_s < until_s]
    return sorted(made, key=lambda decision: decision.at_s)


def _is_about(decision: Decision, subjects: tuple[str, ...]) -> bool:
    """Whether a decision shows that the change was noticed: it names a subject, or it moves blocks."""
    named = any(_mentions(seen, subject) for seen in decision.seen for subject in subjects)
    return named or decision.action not in ("keep", "initial", RECOVER)


def _first_touched_s(record: RunRecord, at_s: float, end_s: float, subjects: tuple[str, ...]) -> float:
    epochs = record.epochs.sort_values("time_s")
    live = epochs[epochs.time_s <= at_s].tail(1)
    left_s = min(epochs[epochs.time_s > at_s].time_s.min(), end_s) if (epochs.time_s > at_s).any() else end_s
    token_s = record.tokens.time_s[record.tokens.time_s >= at_s].min()  # NaN without any
    routes = [str(placement).split(",") for placement in live.placement]
    touched = any(_uses(route, subject, record.source) for route in routes for subject in subjects)
    return float(token_s) if touched and token_s < left_s else at_s


def _uses(route: Sequence[str], subject: str, source: str) -> bool:
    """Whether a pass meets a node, or a link `one/other`. It comes from the gateway at `source` and returns there."""
    ends = set(subject.split("/"))
    return subject in route if len(ends) == 1 else any(set(hop) == ends for hop in pairwise((source, *route, source)))


def _mentions(seen: str, subject: str) -> bool:
    words = set(seen.replace(",", " ").split())
    return all(name in words for name in subject.split("/"))


def _events(record: RunRecord, kind: str) -> pd.DataFrame:
    return record.events[record.events.kind == kind].sort_values("time_s")
