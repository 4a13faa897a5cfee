"""Runs side by side: which measures are shown, their labels, units and definitions, and the table of all runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from resplit.errors import DataError
from resplit.metrics import RunMetrics, summarise
from resplit.records import RunRecord

# Metrics are in seconds, shares and bytes.
SHOWN_PER_UNIT = {"ms": 1e3, "%": 100.0, "MB": 1e-6}


@dataclass(frozen=True)
class Measure:
    """One line of the comparison: which field of `RunMetrics`, how it is shown and what it means."""

    field: str
    label: str
    unit: Literal["", "ms", "s", "%", "1/h", "MB"]
    digits: int
    better: Literal["lower", "higher", "neither"]
    definition: str

    def text(self, value: float) -> str:
        """The value as shown, without its unit."""
        return "-" if np.isnan(value) else f"{value * SHOWN_PER_UNIT.get(self.unit, 1.0):.{self.digits}f}"


MEASURES = (
    Measure("latency_mean_s", "Latency, mean", "ms", 0, "lower",
            "From the arrival of a request at the gateway to its last token; mean over completed requests."),
    Measure("latency_p95_s", "Latency, p95", "ms", 0, "lower",
            "The latency that 95 % of the completed requests stayed within."),
    Measure("first_token_mean_s", "Time to first token, mean", "ms", 0, "lower",
            "From arrival to the first token that leaves the gateway; mean over completed requests."),
    Measure("first_token_p95_s", "Time to first token, p95", "ms", 0, "lower",
            "The time to first token that 95 % of the completed requests stayed within."),
    Measure("time_per_token_s", "Time per token", "ms", 1, "lower",
            "Mean over completed requests of the time between their tokens after the first."),
    Measure("utilization", "Utilisation", "%", 1, "neither",
            "Mean over nodes and time of the share of each node in use, by resplit and by others. A loaded queue is a "
            "slow one: more is not better by itself."),
    Measure("downtime_incidents", "Downtime incidents", "", 0, "lower",
            "Intervals of at least 1 s in which requests were waiting or came in and no token left the gateway."),
    Measure("downtime_incidents_per_hour", "Downtime incidents per hour", "1/h", 1, "lower",
            "Downtime incidents over the length of the run. A short run makes this a coarse figure."),
    Measure("downtime_s", "Downtime", "s", 1, "lower",
            "Total length of the downtime incidents."),
    Measure("qos_met", "QoS met", "%", 1, "higher",
            "Share of offered requests that ended rightly within the objective of their class; 429, 503, errors and "
            "late ones are misses."),
    Measure("privacy_share", "Privacy", "%", 1, "higher",
            "Share of requests none of whose private blocks ran on a node that is not trusted."),
    Measure("privacy_violations", "Privacy violations", "", 0, "lower",
            "Requests with a private block on a node that is not trusted."),
    Measure("offered", "Requests offered", "", 0, "neither",
            "Requests that the workload sent; the same in the static and in the adaptive run."),
    Measure("completed", "Requests completed", "", 0, "higher",
            "Requests that ended rightly, late or not: the ones that latencies are over."),
    Measure("reconfigurations", "Reconfigurations", "", 0, "neither",
            "Epochs committed after the first."),
    Measure("moved_bytes", "Moved", "MB", 1, "neither",
            "Weights and caches sent between nodes by all reconfigurations (1 MB = 1,000,000 bytes)."),
    Measure("pause_max_s", "Pause at a move, longest", "ms", 0, "lower",
            "The longest pause that a stream saw at a reconfiguration."),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the comparison, with the value of each run by its label."""

    measure: Measure
    values: dict[str, float]


def run_label(record: RunRecord) -> str:
    """What a run is called beside others: static, adaptive, undisturbed, or the name of another policy."""
    if record.scenario == "undisturbed":
        return "undisturbed"
    return {"resplit": "adaptive"}.get(record.policy, record.policy)


def summaries(records: list[RunRecord]) -> dict[str, RunMetrics]:
    """The metrics of each run by its label, static, adaptive and undisturbed first; DataError where two share one."""
    labels = [run_label(record) for record in records]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise DataError(f"two runs are called {twice[0]!r}; compare one run of each policy and scenario")
    order = ["static", "adaptive", "undisturbed"]
    ranked = sorted(zip(labels, records, strict=True), key=lambda pair: (*order, pair[0]).index(pair[0]))
    return {label: summarise(record) for label, record in ranked}


def compare(runs: Mapping[str, RunMetrics]) -> list[Row]:
    """One row for each of `MEASURES`, in their order, with the value of every run."""
    return [
        Row(measure, {label: float(getattr(metrics, measure.field)) for label, metrics in runs.items()})
        for measure in MEASURES
    ]


def comparison_text(rows: list[Row]) -> str:
    """The comparison as a plain table for a terminal: one line per measure, one column per run."""
    labels = list(rows[0].values)
    lines = [["", "", *labels]]
    lines += [[row.measure.label, row.measure.unit, *(row.measure.text(row.values[k]) for k in labels)] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(line, widths, strict=True)] for line in lines)
    )
