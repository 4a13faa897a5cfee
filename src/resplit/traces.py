"""Trace files of a scenario: read as tables, scaled, and turned into changes and requests of the scenario.

docs/scenarios.md lists the columns of each kind and where public traces come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from resplit.errors import DataError
from resplit.scenario import (
    BackgroundTrace,
    BandwidthTrace,
    ChurnTrace,
    LinkChange,
    NodeChange,
    RequestTrace,
    RttTrace,
    ScenarioConfig,
    Trace,
)

__all__ = ["TracedRequest", "read_columns", "traced_requests", "with_traces"]

_COLUMNS = {
    "requests": ("arrival_s", "prompt_tokens", "output_tokens"),
    "bandwidth": ("trace_id", "time_s", "throughput_bps"),
    "rtt": ("node_a", "node_b", "rtt_median_ms"),
    "background": ("vm", "time_s", "cpu_utilization"),
    "churn": ("time_s", "event", "node"),
}
_MOST_BACKGROUND = 0.98  # a node that others use wholly would never answer
_LEAST_BPS = 1e3  # so is a link without bandwidth


@dataclass(frozen=True)
class TracedRequest:
    """A request of a trace, `at_s` seconds after the start of the workload."""

    at_s: float
    prompt_tokens: float
    new_tokens: int


def with_traces(scenario: ScenarioConfig, folder: Path) -> ScenarioConfig:
    """The scenario with the changes that its traces describe. Request traces stay, for `traced_requests`.

    File names are relative to `folder`; those that stay are relative to the working directory. DataError names the file
    and the column or value that is wrong.
    """
    nodes, links = list(scenario.nodes), list(scenario.links)
    for trace in scenario.traces:
        match trace:
            case BandwidthTrace():
                links += _bandwidths(trace, folder, scenario.duration)
            case RttTrace():
                links += _latencies(trace, folder)
            case BackgroundTrace():
                nodes += _backgrounds(trace, folder, scenario.duration)
            case ChurnTrace():
                nodes += _churn(trace, folder, scenario.duration)
            case RequestTrace():
                pass
    kept = tuple(
        trace.model_copy(update={"file": str(folder / trace.file)})
        for trace in scenario.traces
        if isinstance(trace, RequestTrace)
    )
    return scenario.model_copy(update={"nodes": tuple(nodes), "links": tuple(links), "traces": kept})


def traced_requests(scenario: ScenarioConfig, folder: Path) -> dict[str, list[TracedRequest]]:
    """The requests of each class that has a request trace, in order of time. DataError as `with_traces`."""
    requests: dict[str, list[TracedRequest]] = {}
    for trace in scenario.traces:
        if isinstance(trace, RequestTrace):
            rows = _within(_read(trace, folder), trace, "arrival_s", scenario.duration).iloc[:: trace.every]
            prompt, new = (_scaled(rows[column], trace) for column in ("prompt_tokens", "output_tokens"))
            requests.setdefault(trace.request_class, []).extend(
                TracedRequest(float(at_s), max(1, round(p)), max(1, round(n)))
                for at_s, p, n in zip(rows.arrival_s, prompt, new, strict=True)
            )
    return {name: sorted(each, key=lambda request: request.at_s) for name, each in requests.items()}


def _bandwidths(trace: BandwidthTrace, folder: Path, duration_s: float) -> list[LinkChange]:
    rows = _named(_read(trace, folder), "trace_id", trace.trace_id, trace, folder)
    rows = _within(rows, trace, "time_s", duration_s)
    return [
        LinkChange.model_construct(
            at=float(at_s), between=trace.between, bandwidth=max(float(bps), _LEAST_BPS) / 8, label=trace.trace_id
        )
        for at_s, bps in zip(rows.time_s, _scaled(rows.throughput_bps, trace), strict=True)
    ]


def _latencies(trace: RttTrace, folder: Path) -> list[LinkChange]:
    rows = _read(trace, folder)
    rtt_ms = {
        frozenset((str(a), str(b))): ms
        for a, b, ms in zip(rows.node_a, rows.node_b, _scaled(rows.rtt_median_ms, trace), strict=True)
    }
    names = list(trace.nodes)
    changes = []
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            pair = frozenset((trace.nodes[one], trace.nodes[other]))
            if pair not in rtt_ms:
                raise DataError(f"{folder / trace.file}: has no row for the nodes {' and '.join(sorted(pair))}")
            latency_s = float(rtt_ms[pair]) / 2e3
            changes.append(LinkChange.model_construct(at=0.0, between=(one, other), latency=latency_s, label="trace"))
    return changes


def _backgrounds(trace: BackgroundTrace, folder: Path, duration_s: float) -> list[NodeChange]:
    rows = _named(_read(trace, folder), "vm", trace.vm, trace, folder)
    rows = _within(rows, trace, "time_s", duration_s)
    shares = np.clip(_scaled(rows.cpu_utilization, trace), 0.0, _MOST_BACKGROUND)
    return [
        NodeChange.model_construct(
            at=float(at_s), node=trace.node, background_utilization=float(share), label=f"vm {trace.vm}"
        )
        for at_s, share in zip(rows.time_s, shares, strict=True)
    ]


def _churn(trace: ChurnTrace, folder: Path, duration_s: float) -> list[NodeChange]:
    rows = _read(trace, folder)
    if trace.trace_id is not None:
        rows = _named(rows, "trace_id", trace.trace_id, trace, folder)
    rows = _within(rows, trace, "time_s", duration_s)
    node_of = {traced: node for node, traced in trace.nodes.items()}
    return [
        NodeChange.model_construct(at=float(at_s), node=node_of[str(name)], up=event == "add", label=f"{event} {name}")
        for at_s, event, name in zip(rows.time_s, rows.event, rows.node, strict=True)
        if str(name) in node_of
    ]


def read_columns(path: Path, columns: Sequence[str], what: str = "this file") -> pd.DataFrame:
    """The rows of a trace file, which must have `columns`. DataError says what is missing, and where it is found."""
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; data/traces/README.md says where traces are, "
            "`resplit traces --fetch` gets them"
        ) from None
    if missing := [column for column in columns if column not in rows]:
        raise DataError(f"{path}: has no column {missing[0]!r}; {what} needs it")
    return rows


def _read(trace: Trace, folder: Path) -> pd.DataFrame:
    return read_columns(folder / trace.file, _COLUMNS[trace.kind], f"a {trace.kind} trace")


def _named(rows: pd.DataFrame, column: str, name: str, trace: Trace, folder: Path) -> pd.DataFrame:
    if column not in rows:
        raise DataError(f"{folder / trace.file}: has no column {column!r}")
    found = rows[rows[column].astype(str) == name]
    if found.empty:
        raise DataError(f"{folder / trace.file}: {column} has no {name!r}")
    return found


def _within(rows: pd.DataFrame, trace: Trace, column: str, duration_s: float) -> pd.DataFrame:
    """The rows of the played part, in order, with `column` in seconds from the start of the workload.

    A value that began before the start holds at it, unless it is an event or a request.
    """
    at_s = (rows[column] - trace.shift) / trace.speed
    rows = rows.assign(**{column: at_s}).sort_values(column, kind="stable")
    if trace.kind in ("bandwidth", "background"):
        begun = rows[rows[column] <= 0].tail(1).assign(**{column: 0.0})
        return pd.concat([begun, rows[(rows[column] > 0) & (rows[column] < duration_s)]])
    return rows[(rows[column] >= 0) & (rows[column] < duration_s)]


def _scaled(values: pd.Series[float], trace: Trace) -> pd.Series[float]:
    scaled = values * trace.scale
    return scaled if trace.clip is None else scaled.clip(*trace.clip)
