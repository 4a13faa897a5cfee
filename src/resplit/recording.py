"""Assembles the record of a run from the reports of gateway, nodes and controller."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from resplit.config import ClusterConfig
from resplit.decide import Decision
from resplit.epochs import LiveEpoch
from resplit.phases import Phase, phases_of
from resplit.reaction import CHANGE, LOSS, RETURN, SURGE, phase_label
from resplit.records import TOKEN_COLUMNS, USE_COLUMNS, RunRecord, table
from resplit.scenario import LinkChange, LoadChange, NodeChange, ScenarioConfig
from resplit.session_records import SessionMove, SessionRecord
from resplit.status import NodeStatus
from resplit.workload import ScheduledRequest

__all__ = ["Observed", "run_record"]

_Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Observed:
    """The reports about a run that began at `start_s`; all times are in seconds since 1970.

    `failed_connections` are requests of which only the client knows. `node_reports` is the telemetry table `nodes` from
    `start_s` on. `epochs` are all epochs so far, including those before the run. `nodes` have the state after the run.
    `foreseen_s` are the times, from the start, of the changes at which a policy that knows the scenario moves.
    `estimate_errors` are those of the estimate at the end of the run.
    """

    start_s: float
    sessions: Sequence[SessionRecord]
    failed_connections: Sequence[ScheduledRequest]
    node_reports: pd.DataFrame
    epochs: Sequence[LiveEpoch]
    decisions: Sequence[Decision]
    blocks: tuple[str, ...]
    nodes: Sequence[NodeStatus]
    foreseen_s: tuple[float, ...] = ()
    estimate_errors: Mapping[str, float] = field(default_factory=dict)


def run_record(
    observed: Observed, cluster: ClusterConfig, scenario: ScenarioConfig, policy: str, seed: int
) -> RunRecord:
    """The record of one run of `policy`, with all times in seconds since the start of the run."""
    epochs = table("epochs", _epochs(observed))
    used = {node for placement in epochs["placement"] for node in placement.split(",")}
    # The others timed single blocks at most: so short a pass is never exact.
    errors = [node.emulation_error for node in observed.nodes if node.node in used and node.emulation_error is not None]
    return RunRecord(
        policy=policy,
        scenario=scenario.name,
        seed=seed,
        duration_s=scenario.duration,
        requests=table("requests", _requests(observed, cluster)),
        tokens=_tokens(observed),
        use=_use(observed),
        events=table("events", _events(observed, cluster, scenario)),
        epochs=epochs,
        decisions=tuple(replace(decision, at_s=decision.at_s - observed.start_s) for decision in observed.decisions),
        blocks=observed.blocks,
        source=cluster.source,
        emulated_nodes=tuple(node.node for node in observed.nodes if node.emulated),
        emulation_error=max(errors, default=math.nan),
        estimate_errors=dict(observed.estimate_errors),
    )


def _requests(observed: Observed, cluster: ClusterConfig) -> _Rows:
    slo_s = {declared.name: math.nan if declared.slo is None else declared.slo for declared in cluster.classes}
    served: _Rows = [
        {
            "request_class": session.request_class,
            "arrival_s": session.arrival_s - observed.start_s,
            "first_token_s": session.first_token_s - observed.start_s,
            "end_s": session.end_s - observed.start_s,
            "prompt_tokens": session.prompt_tokens,
            "new_tokens": session.new_tokens,
            "status": session.status,
            "slo_s": slo_s[session.request_class],
            "private_ok": session.private_ok,
            "epochs": len(session.epochs),
            "waited_s": session.waited_s,
            "computed_s": session.computed_s,
            "hops_s": session.hops_s,
        }
        for session in observed.sessions
    ]
    return served + [
        _failed_connection(request, slo_s[request.request_class]) for request in observed.failed_connections
    ]


def _failed_connection(request: ScheduledRequest, slo_s: float) -> dict[str, object]:
    return {
        "request_class": request.request_class,
        "arrival_s": request.at_s,
        "first_token_s": math.nan,
        "end_s": math.nan,
        "prompt_tokens": 0,
        "new_tokens": 0,
        "status": 0,
        "slo_s": slo_s,
        "private_ok": True,
        "epochs": 0,
        "waited_s": 0.0,
        "computed_s": 0.0,
        "hops_s": 0.0,
    }


def _tokens(observed: Observed) -> pd.DataFrame:
    made = [len(session.token_times_s) for session in observed.sessions]
    time_s = np.fromiter(itertools.chain.from_iterable(session.token_times_s for session in observed.sessions), float)
    columns = {"time_s": time_s - observed.start_s, "request": np.repeat(np.arange(len(made)), made)}
    return pd.DataFrame(columns).astype(TOKEN_COLUMNS)


def _use(observed: Observed) -> pd.DataFrame:
    reports = observed.node_reports.rename(columns={"cpu_utilization": "utilization"})
    return reports.assign(time_s=reports["time_s"] - observed.start_s)[list(USE_COLUMNS)]


def _events(observed: Observed, cluster: ClusterConfig, scenario: ScenarioConfig) -> _Rows:
    """The scenario's changes, one row for those with the same time and label, its phases, and the committed epochs."""
    made: list[NodeChange | LinkChange | LoadChange] = [*scenario.nodes, *scenario.links, *scenario.load]
    labels = sorted({(change.at, change.label) for change in made})
    changes: _Rows = [{"time_s": at_s, "kind": "change", "label": label} for at_s, label in labels]
    changes += [{"time_s": at_s, "kind": "foreseen", "label": "clairvoyant"} for at_s in observed.foreseen_s]
    changes += [
        {"time_s": p.at_s, "kind": "phase", "label": _phase_label(p)} for p in phases_of(cluster, scenario) if p.labels
    ]
    return changes + [
        {"time_s": epoch.committed_s - observed.start_s, "kind": "reconfiguration", "label": epoch.action}
        for epoch in observed.epochs
        if epoch.committed_s >= observed.start_s
    ]


def _phase_label(phase: Phase) -> str:
    subjects = [subject if isinstance(subject, str) else "/".join(subject) for subject in phase.changed]
    up = [phase.nodes[subject].up for subject in phase.changed if subject in phase.came_or_went]
    what = (RETURN if all(up) else LOSS) if up else CHANGE if subjects else SURGE
    return phase_label(what, sorted(subjects))


def _epochs(observed: Observed) -> _Rows:
    """The epoch that was live at the start, with the action "initial", and those that followed."""
    before = [epoch for epoch in observed.epochs if epoch.committed_s <= observed.start_s][-1:]
    after = [epoch for epoch in observed.epochs if epoch.committed_s > observed.start_s]
    moves = [move for session in observed.sessions for move in session.moves]
    return [_epoch(epoch, moves, observed.start_s) for epoch in before + after]


def _epoch(epoch: LiveEpoch, moves: Iterable[SessionMove], start_s: float) -> dict[str, object]:
    own = [move for move in moves if move.epoch == epoch.epoch]
    initial = epoch.committed_s <= start_s
    return {
        "epoch": epoch.epoch,
        "time_s": 0.0 if initial else epoch.committed_s - start_s,
        "action": "initial" if initial else epoch.action,
        "placement": ",".join(epoch.placement),
        "predicted_latency_s": _nan_if_none(epoch.predicted_latency_s),
        "lower_bound": _nan_if_none(epoch.lower_bound),
        "moved_bytes": 0.0 if initial else epoch.loaded_bytes + sum(move.cache_bytes for move in own),
        "pause_s": max((move.pause_s for move in own), default=0.0),
    }


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value
