"""The metrics of a run and their definitions: latency, QoS, downtime, utilisation, privacy and reconfigurations.

All metrics are computed from the tables of a `RunRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from resplit.reaction import false_alarms, reactions
from resplit.records import RunRecord
from resplit.types import FloatArray

INCIDENT_S = 1.0  # least length of a downtime incident


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of one run. Latencies are over the `completed` requests, QoS and privacy over all `offered` ones.

    Shares lie within 0..1. A mean over nothing is NaN. `reaction` defines reactions and false alarms. `regret` and
    `busy_share_saturated` need other runs, and are NaN without them (`comparison.summaries`).
    """

    offered: int
    completed: int
    latency_mean_s: float
    latency_p95_s: float
    first_token_mean_s: float
    first_token_p95_s: float
    time_per_token_s: float
    waited_mean_s: float
    computed_mean_s: float
    hops_mean_s: float
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
    reaction_changes: int
    reaction_moved: int
    reaction_noticed_p50_s: float
    reaction_noticed_p95_s: float
    reaction_live_p50_s: float
    reaction_live_p95_s: float
    false_alarms: float
    exposure_s: float
    busy_share: float
    tokens_per_busy_s: float
    busy_share_saturated: float = float("nan")
    tokens_per_busy_s_saturated: float = float("nan")
    regret: float = float("nan")


@dataclass(frozen=True)
class MeasuredEpoch:
    """One epoch of a run: the prediction for it, and the measurement over its `requests` (NaN without any)."""

    epoch: int
    action: str
    placement: tuple[str, ...]
    time_s: float
    until_s: float
    predicted_latency_s: float
    measured_latency_s: float
    lower_bound: float
    moved_bytes: float
    pause_s: float
    requests: float


_EPOCH_NUMBERS = [name for name, kind in MeasuredEpoch.__annotations__.items() if kind == "float"]


def summarise(record: RunRecord) -> RunMetrics:
    """Compute all metrics of one run. The order of the rows in its tables does not matter."""
    requests = record.requests
    done = requests[completed(requests)]
    latency_s, first_token_s = done.end_s - done.arrival_s, done.first_token_s - done.arrival_s
    incidents = downtime(record)
    moves, reacted, (alarms, exposure_s) = reconfigurations(record), reactions(record), false_alarms(record)
    noticed_s, live_s = _known([each.noticed_s for each in reacted]), _known([each.live_s for each in reacted])
    share, tokens_per_busy_s = busy(record)
    return RunMetrics(
        offered=len(requests),
        completed=len(done),
        latency_mean_s=_mean(latency_s),
        latency_p95_s=_p95(latency_s),
        first_token_mean_s=_mean(first_token_s),
        first_token_p95_s=_p95(first_token_s),
        time_per_token_s=_time_per_token_s(done),
        waited_mean_s=_mean(done.waited_s),
        computed_mean_s=_mean(done.computed_s),
        hops_mean_s=_mean(done.hops_s),
        qos_met=_mean(met_objective(requests)),
        downtime_incidents=len(incidents),
        downtime_incidents_per_hour=len(incidents) * 3600.0 / observed_s(record) if observed_s(record) > 0 else 0.0,
        downtime_s=float((incidents.until_s - incidents.from_s).sum()),
        utilization=_mean(utilization_by_node(record)),
        privacy_share=_mean(requests.private_ok),
        privacy_violations=int((~requests.private_ok.astype(bool)).sum()),
        reconfigurations=len(moves),
        moved_bytes=float(moves.moved_bytes.sum()),
        pause_mean_s=_mean(moves.pause_s),
        pause_max_s=float(moves.pause_s.max()) if len(moves) else float("nan"),
        reaction_changes=len(reacted),
        reaction_moved=len(live_s),
        reaction_noticed_p50_s=float(noticed_s.median()),
        reaction_noticed_p95_s=_p95(noticed_s),
        reaction_live_p50_s=float(live_s.median()),
        reaction_live_p95_s=_p95(live_s),
        false_alarms=alarms,
        exposure_s=exposure_s,
        busy_share=share,
        tokens_per_busy_s=tokens_per_busy_s,
    )


def completed(requests: pd.DataFrame) -> pd.Series[bool]:
    """Whether each request ended successfully: status 200 and an end."""
    return (requests.status == 200) & requests.end_s.notna()


def reconfigurations(record: RunRecord) -> pd.DataFrame:
    """The epochs of a run that were committed after its first one."""
    return record.epochs[record.epochs.action != "initial"]


def met_objective(requests: pd.DataFrame) -> pd.Series[bool]:
    """Whether each offered request completed, and within `slo_s` where its class has an objective.

    Refused (429, 503), failed, late and unfinished requests have not met their objective.
    """
    in_time = requests.slo_s.isna() | (requests.end_s - requests.arrival_s <= requests.slo_s)
    return completed(requests) & in_time


def observed_s(record: RunRecord) -> float:
    """The length of the run in seconds, extended to the end of its last request or token."""
    moments = [record.duration_s, record.requests.end_s.max(), record.tokens.time_s.max()]
    return float(np.nanmax(np.asarray(moments, dtype=float)))


def energy_j_per_request(record: RunRecord, compute_w: Mapping[str, float | None]) -> float:
    """Joules that the nodes spent on requests, above idle, per offered request; NaN if the power of a node is unknown.

    `compute_w` is the power above idle by node. It is drawn for the share of time that resplit uses of a node.
    """
    use = record.use[record.use.time_s.between(0.0, record.duration_s)]
    own = use.groupby("node").own_utilization.mean()
    watts = [compute_w.get(str(node)) for node in own.index]
    if not len(record.requests) or any(each is None for each in watts):
        return float("nan")
    return float(own.to_numpy() @ np.array(watts, dtype=float)) * record.duration_s / len(record.requests)


def downtime(record: RunRecord) -> pd.DataFrame:
    """The downtime incidents of a run, as rows of `from_s` and `until_s`.

    An incident is a maximal interval of at least `INCIDENT_S` in which there was demand throughout and no token left
    the gateway. Demand exists in two cases:

    - An admitted request (status 200, 0 or 5xx) is in the system, from its arrival to its end. A request without an
      end counts until the end of the run, unless its connection failed (status 0).
    - Two requests failed (status 0 or 5xx) and no token left between them. A system that answers 503 at once has no
      request waiting, but it is down.

    Requests that were shed (429) or malformed (other 4xx) create no demand. Idle time is not downtime. A first token
    that takes a second on an idle system counts as an incident, because the record cannot tell it from an outage.
    """
    token_s = np.sort(record.tokens.time_s.to_numpy(dtype=float))
    incidents: list[tuple[float, float]] = []
    for from_s, until_s in _demand_intervals(record, token_s):
        inside = token_s[np.searchsorted(token_s, from_s) : np.searchsorted(token_s, until_s, side="right")]
        moments = np.concatenate([[from_s], inside, [until_s]])
        long = np.diff(moments) >= INCIDENT_S
        incidents += zip(moments[:-1][long].tolist(), moments[1:][long].tolist(), strict=True)
    return pd.DataFrame(incidents, columns=["from_s", "until_s"], dtype=float)


def utilization_by_node(record: RunRecord) -> pd.Series[float]:
    """Mean utilisation of each node within the run's duration; later samples, while requests drain, are left out."""
    use = record.use[record.use.time_s.between(0.0, record.duration_s)]
    return use.groupby("node").utilization.mean()


def busy(record: RunRecord) -> tuple[float, float]:
    """The share of time in which the executor of a used node computes, and the tokens per second of that time.

    A node is used while it holds blocks of the live placement. What others use of a node stretches its passes, so the
    executor's time is resplit's use over what others leave. NaN without any sample of a used node.
    """
    use = record.use[record.use.time_s.between(0.0, record.duration_s)].sort_values("time_s")
    epochs = record.epochs.sort_values("time_s")
    if use.empty or epochs.empty:
        return float("nan"), float("nan")
    live = np.maximum(np.searchsorted(epochs.time_s, use.time_s, side="right") - 1, 0)
    routes = [set(str(placement).split(",")) for placement in epochs.placement]
    used = use[[node in routes[index] for node, index in zip(use.node, live, strict=True)]]
    left = (1 - (used.utilization - used.own_utilization)).clip(lower=0.01)
    share = (used.own_utilization / left).clip(upper=1.0)
    samples_per_node = max(1.0, len(use) / use.node.nunique())
    busy_s = float(share.sum()) * record.duration_s / samples_per_node
    tokens = int(record.tokens.time_s.between(0.0, record.duration_s).sum())
    return _mean(share), tokens / busy_s if busy_s > 0 else float("nan")


def series(record: RunRecord, step_s: float = 1.0, window_s: float = 10.0) -> pd.DataFrame:
    """The run over time: one row every `step_s` seconds, computed over the `window_s` seconds before it.

    Columns: `time_s`; `latency_s`, the mean latency of the completed requests that arrived in the window; `qos_met`,
    the share of the requests that arrived in it and met their objective; `utilization`, the mean over the nodes of
    their mean utilisation. A value is NaN where the window holds no request or no sample.
    """
    time_s = _steps_s(record, step_s)
    requests = record.requests
    done = requests[completed(requests)]
    per_node = list(_rolling_utilization(record, time_s, window_s).values())
    return pd.DataFrame(
        {
            "time_s": time_s,
            "latency_s": _rolling(done.arrival_s, done.end_s - done.arrival_s, time_s, window_s),
            "qos_met": _rolling(requests.arrival_s, met_objective(requests), time_s, window_s),
            "utilization": _nan_mean(per_node, len(time_s)),
        }
    )


def utilization_series(record: RunRecord, step_s: float = 1.0, window_s: float = 5.0) -> pd.DataFrame:
    """Utilisation of each node over time: `time_s` and one column for each node, computed as in `series`."""
    time_s = _steps_s(record, step_s)
    return pd.DataFrame({"time_s": time_s, **_rolling_utilization(record, time_s, window_s)})


def epoch_latency(record: RunRecord) -> pd.DataFrame:
    """The epochs in order with the columns `until_s`, `requests` and `measured_latency_s` added.

    `measured_latency_s` is the mean latency of the completed requests that arrived while the epoch was live and were
    served by it alone; `requests` is their number. A request that was moved between epochs measures neither of them.
    """
    epochs = record.epochs.sort_values("time_s", ignore_index=True)
    done = record.requests[completed(record.requests) & (record.requests.epochs <= 1)]
    live = np.searchsorted(epochs.time_s.to_numpy(dtype=float), done.arrival_s.to_numpy(dtype=float), side="right") - 1
    # The first epoch was live before the first arrival, even if its rounded commit time says otherwise.
    latency_s = (done.end_s - done.arrival_s).groupby(np.maximum(live, 0))
    ends = [*epochs.time_s.iloc[1:], observed_s(record)]
    return epochs.assign(
        until_s=np.asarray(ends[: len(epochs)], dtype=float),
        requests=latency_s.size().reindex(epochs.index, fill_value=0),
        measured_latency_s=latency_s.mean().reindex(epochs.index),
    )


def measured_epochs(record: RunRecord) -> list[MeasuredEpoch]:
    """The rows of `epoch_latency` as values."""
    return [
        MeasuredEpoch(
            epoch=int(row["epoch"]),
            action=str(row["action"]),
            placement=tuple(str(row["placement"]).split(",")),
            **{name: float(row[name]) for name in _EPOCH_NUMBERS},
        )
        for row in epoch_latency(record).to_dict("records")
    ]


def _steps_s(record: RunRecord, step_s: float) -> FloatArray:
    return np.arange(step_s, record.duration_s + step_s / 2, step_s)


def _rolling_utilization(record: RunRecord, time_s: FloatArray, window_s: float) -> dict[str, FloatArray]:
    """Mean utilisation by node in the window before each of `time_s`."""
    return {
        str(node): _rolling(use.time_s, use.utilization, time_s, window_s) for node, use in record.use.groupby("node")
    }


def _time_per_token_s(done: pd.DataFrame) -> float:
    several = done[done.new_tokens > 1]
    return _mean((several.end_s - several.first_token_s) / (several.new_tokens - 1))


def _demand_intervals(record: RunRecord, token_s: FloatArray) -> list[tuple[float, float]]:
    """The disjoint intervals with demand, in order (see `downtime`)."""
    requests = record.requests
    failed = (requests.status == 0) | (requests.status >= 500)
    admitted = requests[failed | (requests.status == 200)]
    default_end_s = admitted.arrival_s.where(admitted.status == 0, observed_s(record))
    spans = list(zip(admitted.arrival_s, admitted.end_s.fillna(default_end_s), strict=True))
    spans += _between_failures(requests[failed], token_s)
    merged: list[tuple[float, float]] = []
    for from_s, until_s in sorted((float(start), float(end)) for start, end in spans):
        if merged and from_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until_s))
        else:
            merged.append((from_s, until_s))
    return merged


def _between_failures(failed: pd.DataFrame, token_s: FloatArray) -> list[tuple[float, float]]:
    """From the arrival of each failed request to the next failed arrival, where no token left in between."""
    arrival_s = np.sort(failed.arrival_s.to_numpy(dtype=float))
    tokens_before = np.searchsorted(token_s, arrival_s)
    silent = np.flatnonzero(np.diff(tokens_before) == 0)
    return [(float(arrival_s[i]), float(arrival_s[i + 1])) for i in silent]


def _rolling(
    at_s: pd.Series[float], values: pd.Series[float] | pd.Series[bool], time_s: FloatArray, window_s: float
) -> FloatArray:
    """Mean of `values` over (t - window_s, t] for each t of `time_s`; NaN where no value lies in the window."""
    order = np.argsort(at_s.to_numpy(dtype=float), kind="stable")
    moments = at_s.to_numpy(dtype=float)[order]
    running = np.concatenate([[0.0], np.cumsum(values.to_numpy(dtype=float)[order])])
    last = np.searchsorted(moments, time_s, side="right")
    first = np.searchsorted(moments, time_s - window_s, side="right")
    count = last - first
    return np.where(count > 0, (running[last] - running[first]) / np.maximum(count, 1), np.nan)


def _nan_mean(columns: list[FloatArray], length: int) -> FloatArray:
    """Mean of the known values at each position (times,); NaN if every column is NaN there."""
    stacked = np.array(columns).reshape(len(columns), length)  # (nodes, times)
    known = ~np.isnan(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _known(values: list[float]) -> pd.Series[float]:
    return pd.Series(values, dtype=float).dropna()


def _mean(values: pd.Series[float] | pd.Series[bool]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _p95(values: pd.Series[float]) -> float:
    return float(np.percentile(values, 95)) if len(values) else float("nan")
