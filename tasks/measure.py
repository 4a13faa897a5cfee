"""Measure: one run of a workload, and everything that the cluster knows of it, as a `RunRecord`."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.config import ClusterConfig, ScenarioConfig
from resplit.epochs import LiveEpoch
from resplit.records import RunRecord, table
from resplit.session_records import SessionRecord
from resplit.status import DecisionEntry
from tasks.workload import ScheduledRequest, Sent, send


@task(name="serve workload", cache_policy=NO_CACHE)
def serve_workload(
    url: str, token: str, model: str, arrivals: list[ScheduledRequest], scenario: ScenarioConfig
) -> Sent:
    """Send a workload while the cluster changes on schedule."""
    return send(url, token, model, arrivals, scenario)


@task(name="measure", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE)
def measure(
    client: ControlClient,
    cluster: ClusterConfig,
    scenario: ScenarioConfig,
    policy: str,
    seed: int,
    sent: Sent,
    first_record: int,
    first_decision: int,
) -> RunRecord:
    """The record of the run that `sent` was; the logs' entries before it are passed over."""
    records = client.records(first_record)
    status = client.status()
    errors = [node.emulation_error for node in status.nodes if node.emulation_error is not None]
    return RunRecord(
        policy=policy,
        scenario=scenario.name,
        seed=seed,
        duration_s=scenario.duration,
        requests=table("requests", _requests(cluster, records, sent)),
        tokens=table("tokens", _tokens(records, sent.start_s)),
        use=table("use", _use(client.telemetry(sent.start_s).nodes, sent.start_s)),
        events=table("events", _events(scenario, client.epochs(), sent.start_s)),
        epochs=table("epochs", _epochs(client.epochs(), records, sent.start_s)),
        decisions=[_shifted(entry, sent.start_s) for entry in client.decisions(first_decision)],
        blocks=status.blocks,
        emulated_nodes=tuple(node.node for node in status.nodes if node.emulated),
        emulation_error=max(errors, default=math.nan),
    )


def _requests(cluster: ClusterConfig, records: list[SessionRecord], sent: Sent) -> list[dict[str, Any]]:
    slo_s = {c.name: math.nan if c.slo is None else c.slo for c in cluster.classes}
    rows = [
        {
            "request_class": record.request_class,
            "arrival_s": record.arrival_s - sent.start_s,
            "first_token_s": record.first_token_s - sent.start_s,
            "end_s": record.end_s - sent.start_s,
            "prompt_tokens": record.prompt_tokens,
            "new_tokens": record.new_tokens,
            "status": record.status,
            "slo_s": slo_s[record.request_class],
            "private_ok": record.private_ok,
            "epochs": len(record.epochs),
        }
        for record in records
    ]
    return rows + [_broken(arrival, slo_s[arrival.request_class]) for arrival in sent.broken]


def _broken(arrival: ScheduledRequest, slo_s: float) -> dict[str, Any]:
    return {
        "request_class": arrival.request_class,
        "arrival_s": arrival.at_s,
        "first_token_s": math.nan,
        "end_s": math.nan,
        "prompt_tokens": 0,
        "new_tokens": 0,
        "status": 0,
        "slo_s": slo_s,
        "private_ok": True,
        "epochs": 0,
    }


def _tokens(records: list[SessionRecord], start_s: float) -> list[dict[str, Any]]:
    return [
        {"time_s": time_s - start_s, "request": index}
        for index, record in enumerate(records)
        for time_s in record.token_times_s
    ]


def _use(nodes: pd.DataFrame, start_s: float) -> list[dict[str, Any]]:
    return [
        {
            "time_s": row.time_s - start_s,
            "node": row.node,
            "utilization": row.cpu_utilization,
            "own_utilization": row.own_utilization,
        }
        for row in nodes.itertuples()
    ]


def _events(scenario: ScenarioConfig, epochs: list[LiveEpoch], start_s: float) -> list[dict[str, Any]]:
    labels = {(change.at, change.label) for change in (*scenario.nodes, *scenario.links, *scenario.load)}
    changes = [{"time_s": at_s, "kind": "change", "label": label} for at_s, label in sorted(labels)]
    moves = [
        {"time_s": epoch.committed_s - start_s, "kind": "reconfiguration", "label": epoch.action}
        for epoch in epochs
        if epoch.committed_s >= start_s
    ]
    return changes + moves


def _epochs(epochs: list[LiveEpoch], records: list[SessionRecord], start_s: float) -> list[dict[str, Any]]:
    """The epoch that was live at the start, as initial, and those that followed."""
    before = [epoch for epoch in epochs if epoch.committed_s <= start_s][-1:]
    rows = []
    for epoch in before + [epoch for epoch in epochs if epoch.committed_s > start_s]:
        moves = [move for record in records for move in record.moves if move.epoch == epoch.epoch]
        initial = epoch.committed_s <= start_s
        moved = epoch.loaded_bytes + sum(move.cache_bytes for move in moves)
        rows.append(
            {
                "epoch": epoch.epoch,
                "time_s": 0.0 if initial else epoch.committed_s - start_s,
                "action": "initial" if initial else epoch.action,
                "placement": ",".join(epoch.placement),
                "predicted_latency_s": _number(epoch.predicted_latency_s),
                "lower_bound": _number(epoch.lower_bound),
                "moved_bytes": 0.0 if initial else moved,
                "pause_s": max((move.pause_s for move in moves), default=0.0),
            }
        )
    return rows


def _shifted(entry: DecisionEntry, start_s: float) -> dict[str, Any]:
    return entry.body | {"id": entry.id, "at_s": entry.body["at_s"] - start_s}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
