"""What a run was worth: latency, QoS, downtime, utilisation, privacy and moves, by one set of definitions.

Computes from the tables of a `RunRecord` alone; does not know whether a cluster or a simulator filled them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from resplit.records import RunRecord
from resplit.types import FloatArray

INCIDENT_S = 1.0


@dataclass(frozen=True)
class RunMetrics:
    """One run in numbers: latencies over the `completed` requests, QoS over the `offered` ones; NaN: none to ask."""

    offered: int
    completed: int
    latency_mean_s: float
    latency_p95_s: float
    first_token_mean_s: float
    first_token_p95_s: float
    time_per_token_s: float
    qos_met: float
    downtime_incidents: int
    downtime_incidents_per_hour: float
    downtime_s: float
    utilization: float
    privacy_share: float
    privacy_violations: int
    reconfigurations: int
    moved_bytes: float
    pause_mean_s: float
    pause_max_s: float


def summarise(record: RunRecord) -> RunMetrics:
    """All metrics of one run; the order of the rows in its tables does not matter."""
    requests = record.requests
    done = requests[_completed(requests)]
    latency_s, first_token_s = done.end_s - done.arrival_s, done.first_token_s - done.arrival_s
    silences = downtime(record)
    moves = record.epochs[record.epochs.action != "initial"]
    return RunMetrics(
        offered=len(requests),
        completed=len(done),
        latency_mean_s=_mean(latency_s),
        latency_p95_s=_p95(latency_s),
        first_token_mean_s=_mean(first_token_s),
        first_token_p95_s=_p95(first_token_s),
        time_per_token_s=_time_per_token_s(done),
        qos_met=_mean(met(requests)),
        downtime_incidents=len(silences),
        downtime_incidents_per_hour=len(silences) * 3600.0 / observed_s(record) if observed_s(record) > 0 else 0.0,
        downtime_s=float((silences.until_s - silences.from_s).sum()),
        utilization=_mean(utilization_by_node(record)),
        privacy_share=_mean(requests.private_ok),
        privacy_violations=int((~requests.private_ok.astype(bool)).sum()),
        reconfigurations=len(moves),
        moved_bytes=float(moves.moved_bytes.sum()),
        pause_mean_s=_mean(moves.pause_s),
        pause_max_s=float(moves.pause_s.max()) if len(moves) else float("nan"),
    )


def met(requests: pd.DataFrame) -> pd.Series[bool]:
    """For each offered request: did it end rightly, and within `slo_s` where its class has one?

    Refused (429, 503), failed and late requests are misses; so is one that had not ended when the run did.
    """
    in_time = requests.slo_s.isna() | (requests.end_s - requests.arrival_s <= requests.slo_s)
    return _completed(requests) & in_time


def observed_s(record: RunRecord) -> float:
    """Length of the run in seconds, until the last request that came in it had ended."""
    moments = [record.duration_s, record.requests.end_s.max(), record.tokens.time_s.max()]
    return float(np.nanmax(np.asarray(moments, dtype=float)))


def downtime(record: RunRecord) -> pd.DataFrame:
    """The downtime incidents of a run, as rows of `from_s` and `until_s`.

    An incident is a maximal interval, at least `INCIDENT_S` long, in which service was wanted at every moment and no
    token left the gateway. Service is wanted while a request that was let in (status 200, 0 or 5xx) is in the system,
    from its arrival to its end; one that never ended stays until the end of the run, unless its connection failed. It
    is also wanted between two requests that failed (0 or 5xx) with no token between them: a system that answers 503 at
    once has nobody waiting, yet is down. Shed (429) and malformed (other 4xx) requests do not count: where a full
    house sheds, those inside are served or waiting. Idle times are no downtime, however long. A first token that
    takes a second on an otherwise idle system *is* an incident: nothing in the record tells it from an outage.
    """
    token_s = np.sort(record.tokens.time_s.to_numpy(dtype=float))
    incidents: list[tuple[float, float]] = []
    for from_s, until_s in _wanted(record, token_s):
        inside = token_s[np.searchsorted(token_s, from_s) : np.searchsorted(token_s, until_s, side="right")]
        moments = np.concatenate([[from_s], inside, [until_s]])
        long = np.diff(moments) >= INCIDENT_S
        incidents += zip(moments[:-1][long].tolist(), moments[1:][long].tolist(), strict=True)
    return pd.DataFrame(incidents, columns=["from_s", "until_s"], dtype=float)


def utilization_by_node(record: RunRecord) -> pd.Series[float]:
    """Mean utilisation of each node while the workload came in, over its samples; the drain at the end is left out."""
    use = record.use[record.use.time_s.between(0.0, record.duration_s)]
    return use.groupby("node").utilization.mean()


def series(record: RunRecord, step_s: float = 1.0, window_s: float = 10.0) -> pd.DataFrame:
    """The run over time, one row every `step_s`, each over the `window_s` seconds that end there.

    Columns: `time_s`; `latency_s`, mean of the completed requests that arrived in the window; `qos_met`, share of all
    that arrived in it; `utilization`, mean over nodes of their means. NaN where nothing arrived or was sampled.
    """
    time_s = np.arange(step_s, record.duration_s + step_s / 2, step_s)
    requests = record.requests
    done = requests[_completed(requests)]
    per_node = [_rolling(use.time_s, use.utilization, time_s, window_s) for _, use in record.use.groupby("node")]
    return pd.DataFrame(
        {
            "time_s": time_s,
            "latency_s": _rolling(done.arrival_s, done.end_s - done.arrival_s, time_s, window_s),
            "qos_met": _rolling(requests.arrival_s, met(requests), time_s, window_s),
            "utilization": _nan_mean(per_node, len(time_s)),
        }
    )


def utilization_series(record: RunRecord, step_s: float = 1.0, window_s: float = 5.0) -> pd.DataFrame:
    """Utilisation of each node over time: `time_s` and one column per node, as in `series`."""
    time_s = np.arange(step_s, record.duration_s + step_s / 2, step_s)
    by_node = {
        str(node): _rolling(use.time_s, use.utilization, time_s, window_s) for node, use in record.use.groupby("node")
    }
    return pd.DataFrame({"time_s": time_s, **by_node})


def epoch_latency(record: RunRecord) -> pd.DataFrame:
    """The epochs in order, each with `until_s` and what it was predicted to take beside what it took.

    `measured_latency_s` is the mean over the `requests` that arrived while the epoch was live, completed, and were
    served by no other epoch (a request that lived through a move says nothing of either placement).
    """
    epochs = record.epochs.sort_values("time_s", ignore_index=True)
    done = record.requests[_completed(record.requests) & (record.requests.epochs <= 1)]
    live = np.searchsorted(epochs.time_s.to_numpy(dtype=float), done.arrival_s.to_numpy(dtype=float), side="right") - 1
    # The first epoch serves from before the first arrival, whatever its commit's moment was rounded to.
    latency_s = (done.end_s - done.arrival_s).groupby(np.maximum(live, 0))
    ends = [*epochs.time_s.iloc[1:], observed_s(record)]
    return epochs.assign(
        until_s=np.asarray(ends[: len(epochs)], dtype=float),
        requests=latency_s.size().reindex(epochs.index, fill_value=0),
        measured_latency_s=latency_s.mean().reindex(epochs.index),
    )


def _completed(requests: pd.DataFrame) -> pd.Series[bool]:
    return (requests.status == 200) & requests.end_s.notna()


def _time_per_token_s(done: pd.DataFrame) -> float:
    several = done[done.new_tokens > 1]
    return _mean((several.end_s - several.first_token_s) / (several.new_tokens - 1))


def _wanted(record: RunRecord, token_s: FloatArray) -> list[tuple[float, float]]:
    """The disjoint intervals in which service was wanted, in order (see `downtime`)."""
    requests = record.requests
    failed = (requests.status == 0) | (requests.status >= 500)
    inside = requests[failed | (requests.status == 200)]
    never_ended = inside.arrival_s.where(inside.status == 0, observed_s(record))
    spans = list(zip(inside.arrival_s, inside.end_s.fillna(never_ended), strict=True))
    spans += _between_failures(requests[failed], token_s)
    merged: list[tuple[float, float]] = []
    for from_s, until_s in sorted((float(start), float(end)) for start, end in spans):
        if merged and from_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until_s))
        else:
            merged.append((from_s, until_s))
    return merged


def _between_failures(failed: pd.DataFrame, token_s: FloatArray) -> list[tuple[float, float]]:
    """From each failed request's arrival to the next one's, where no token left between the two."""
    arrival_s = np.sort(failed.arrival_s.to_numpy(dtype=float))
    tokens_before = np.searchsorted(token_s, arrival_s)
    silent = np.flatnonzero(np.diff(tokens_before) == 0)
    return [(float(arrival_s[i]), float(arrival_s[i + 1])) for i in silent]


def _rolling(
    at_s: pd.Series[float], values: pd.Series[float] | pd.Series[bool], time_s: FloatArray, window_s: float
) -> FloatArray:
    """Mean of `values` in the window (t - window_s, t] for each t of `time_s`; NaN where it is empty."""
    order = np.argsort(at_s.to_numpy(dtype=float), kind="stable")
    moments = at_s.to_numpy(dtype=float)[order]
    running = np.concatenate([[0.0], np.cumsum(values.to_numpy(dtype=float)[order])])
    last = np.searchsorted(moments, time_s, side="right")
    first = np.searchsorted(moments, time_s - window_s, side="right")
    count = last - first
    return np.where(count > 0, (running[last] - running[first]) / np.maximum(count, 1), np.nan)


def _nan_mean(columns: list[FloatArray], length: int) -> FloatArray:
    """Row means over the columns that are known there; NaN where none is."""
    stacked = np.array(columns).reshape(len(columns), length)  # (nodes, times)
    known = ~np.isnan(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _mean(values: pd.Series[float] | pd.Series[bool]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _p95(values: pd.Series[float]) -> float:
    return float(np.percentile(values, 95)) if len(values) else float("nan")
