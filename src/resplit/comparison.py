"""The comparison of runs for readers: which metrics are shown, with which label, unit and definition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from resplit.errors import DataError
from resplit.metrics import RunMetrics, summarise
from resplit.records import RunRecord

UNDISTURBED = "undisturbed"  # the name of a scenario without its changes
SATURATED = "saturated"  # that of a run in which streams always wait
SHOWN_PER_UNIT = {"ms": 1e3, "%": 100.0, "MB": 1e-6}  # metrics are in seconds, shares and bytes


@dataclass(frozen=True)
class Measure:
    """One line of the comparison: a field of `RunMetrics`, its presentation and its definition."""

    field: str
    label: str
    unit: Literal["", "ms", "s", "%", "1/h", "MB"]
    digits: int
    better: Literal["lower", "higher", "neither"]
    definition: str

    def text(self, value: float) -> str:
        """The value as it is shown, without its unit."""
        return "-" if np.isnan(value) else f"{value * SHOWN_PER_UNIT.get(self.unit, 1.0):.{self.digits}f}"


MEASURES = (
    Measure("latency_mean_s", "Latency, mean", "ms", 0, "lower",
            "From the arrival of a request at the gateway to its last token; mean over completed requests."),
    Measure("latency_p95_s", "Latency, p95", "ms", 0, "lower",
            "95th percentile of the latency of completed requests."),
    Measure("first_token_mean_s", "Time to first token, mean", "ms", 0, "lower",
            "From the arrival of a request to the first token that leaves the gateway; mean over completed requests."),
    Measure("first_token_p95_s", "Time to first token, p95", "ms", 0, "lower",
            "95th percentile of the time to first token of completed requests."),
    Measure("time_per_token_s", "Time per token", "ms", 1, "lower",
            "Time between tokens after the first one; mean over completed requests."),
    Measure("waited_mean_s", "Time in queues of nodes", "ms", 0, "lower",
            "Time that the passes of a request waited at nodes for a batch; mean over completed requests."),
    Measure("computed_mean_s", "Time in batches of nodes", "ms", 0, "lower",
            "Time that the passes of a request were computed, with the other sessions in the batch; mean as above."),
    Measure("hops_mean_s", "Time between nodes", "ms", 0, "lower",
            "Time that the passes of a request spent between nodes and the gateway; mean as above."),
    Measure("utilization", "Utilisation", "%", 1, "neither",
            "Share of each node in use, by resplit and by other programs; mean over nodes and time. Higher is not "
            "better by itself, because queues grow with load."),
    Measure("downtime_incidents", "Downtime incidents", "", 0, "lower",
            "Intervals of at least 1 s in which requests waited or arrived and no token left the gateway."),
    Measure("downtime_incidents_per_hour", "Downtime incidents per hour", "1/h", 1, "lower",
            "Downtime incidents divided by the length of the run. In a short run this is a coarse figure."),
    Measure("downtime_s", "Downtime", "s", 1, "lower",
            "Total length of the downtime incidents."),
    Measure("qos_met", "QoS met", "%", 1, "higher",
            "Share of offered requests that completed within the service objective of their class. Requests that were "
            "refused (429, 503), failed or late are misses."),
    Measure("privacy_share", "Privacy", "%", 1, "higher",
            "Share of requests whose private blocks ran on trusted nodes only."),
    Measure("privacy_violations", "Privacy violations", "", 0, "lower",
            "Requests for which a private block ran on a node that is not trusted."),
    Measure("offered", "Requests offered", "", 0, "neither",
            "Requests that the workload sent. The static and the adaptive run offer the same."),
    Measure("completed", "Requests completed", "", 0, "higher",
            "Requests that ended successfully, late or not. Latencies are over these."),
    Measure("reconfigurations", "Reconfigurations", "", 0, "neither",
            "Epochs committed after the first."),
    Measure("moved_bytes", "Moved", "MB", 1, "neither",
            "Weights and caches sent between nodes by all reconfigurations (1 MB = 1,000,000 bytes)."),
    Measure("pause_max_s", "Pause at a move, longest", "ms", 0, "lower",
            "The longest pause of a token stream at a reconfiguration."),
    Measure("reaction_noticed_p50_s", "Change noticed, median", "ms", 0, "lower",
            "From the first token after a change over a route with the changed node or link to the first decision on "
            "it. Counted are changes of nodes and links at which a policy that knows the scenario moves."),
    Measure("reaction_noticed_p95_s", "Change noticed, p95", "ms", 0, "lower",
            "95th percentile of the same."),
    Measure("reaction_live_p50_s", "New placement live, median", "ms", 0, "lower",
            "From the same moment to the commit of the next epoch."),
    Measure("reaction_live_p95_s", "New placement live, p95", "ms", 0, "lower",
            "95th percentile of the same."),
    Measure("false_alarms", "False alarms", "", 0, "lower",
            "Detected changes of nodes and links that no change of the scenario in the ten seconds before explains."),
    Measure("busy_share", "Busy share of used nodes", "%", 1, "neither",
            "Share of time in which the executor of a node that holds blocks of the live placement computes."),
    Measure("busy_share_saturated", "Busy share, saturated", "%", 1, "higher",
            "The same in another run of the policy, in which twelve streams always wait."),
    Measure("regret", "Regret", "", 2, "lower",
            "Mean latency relative to that of the policy that knows the scenario, with the same requests."),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the comparison: a measure and the value of each run by its label."""

    measure: Measure
    values: dict[str, float]


def run_label(record: RunRecord) -> str:
    """The label of a run in a comparison: static, adaptive, undisturbed, or the name of another policy.

    That of a saturated run is the label of its policy and "-saturated".
    """
    if record.scenario == UNDISTURBED:
        return UNDISTURBED
    label = {"resplit": "adaptive"}.get(record.policy, record.policy)
    return f"{label}-{SATURATED}" if record.scenario == SATURATED else label


def summaries(records: list[RunRecord]) -> dict[str, RunMetrics]:
    """The metrics of each run by its label: static, adaptive, undisturbed, then the others in the order given.

    Saturated runs only give theirs to the run of the same policy. DataError if two runs have the same label.
    """
    labels = [run_label(record) for record in records]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise DataError(f"two runs are labelled {repeated[0]!r}: compare one run for each policy and scenario")
    order = ["static", "adaptive", UNDISTURBED]
    ranked = sorted(zip(labels, records, strict=True), key=lambda pair: (*order, pair[0]).index(pair[0]))
    return with_other_runs({label: summarise(record) for label, record in ranked})


def with_other_runs(metrics: Mapping[str, RunMetrics]) -> dict[str, RunMetrics]:
    """The metrics of runs with equal seeds, by label, with what they say of each other, and without saturated runs."""
    unknown, best = float("nan"), metrics.get("clairvoyant")
    found = {}
    for label, own in metrics.items():
        if not label.endswith(f"-{SATURATED}"):
            full = metrics.get(f"{label}-{SATURATED}")
            found[label] = replace(
                own,
                regret=own.latency_mean_s / best.latency_mean_s if best else unknown,
                busy_share_saturated=full.busy_share if full else unknown,
                tokens_per_busy_s_saturated=full.tokens_per_busy_s if full else unknown,
            )
    return found


def scenario_changes(runs: Mapping[str, RunRecord]) -> list[tuple[float, str]]:
    """The changes of the scenario as (seconds since the start, label), in order.

    Runs of one scenario share their changes, and each run makes them at slightly different times: the earliest counts.
    """
    earliest: dict[tuple[str, int], float] = {}
    for record in runs.values():
        made = record.events[record.events.kind == "change"].sort_values("time_s")
        for label, time_s, repeat in zip(made.label, made.time_s, made.groupby("label").cumcount(), strict=True):
            key = (str(label), int(repeat))
            earliest[key] = min(earliest.get(key, math.inf), float(time_s))
    return sorted((time_s, label) for (label, _), time_s in earliest.items())


def compare(runs: Mapping[str, RunMetrics]) -> list[Row]:
    """One row for each of `MEASURES`, in order, with the value of every run."""
    return [
        Row(measure, {label: float(getattr(metrics, measure.field)) for label, metrics in runs.items()})
        for measure in MEASURES
    ]


def comparison_text(rows: list[Row]) -> str:
    """The comparison as a table for a terminal: one line for each measure, one column for each run."""
    labels = list(rows[0].values)
    lines = [["", "", *labels]]
    lines += [[row.measure.label, row.measure.unit, *(row.measure.text(row.values[k]) for k in labels)] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(line, widths, strict=True)] for line in lines)
    )


def verdict(rows: Sequence[Row]) -> str:
    """The comparison in one sentence; empty unless there are a static and an adaptive run."""
    row = {row.measure.field: row for row in rows}
    if not {"static", "adaptive"} <= row["latency_mean_s"].values.keys():
        return ""

    def pair(name: str) -> str:
        measure, values = row[name].measure, row[name].values
        unit = f"\u00a0{measure.unit}" if measure.unit else ""
        return f"{measure.text(values['adaptive'])}{unit} against {measure.text(values['static'])}{unit}"

    return (
        f"Adaptive against static: mean latency {pair('latency_mean_s')} ({change(row['latency_mean_s'])}), "
        f"p95 {pair('latency_p95_s')} ({change(row['latency_p95_s'])}), objectives met {pair('qos_met')}, "
        f"downtime incidents {pair('downtime_incidents')}, privacy violations {pair('privacy_violations')}."
    )


def change(row: Row) -> str:
    """The adaptive value relative to the static one, in words; empty unless both are known."""
    static, adaptive = row.values.get("static", math.nan), row.values.get("adaptive", math.nan)
    if not (math.isfinite(static) and math.isfinite(adaptive)):
        return ""
    if row.measure.text(static) == row.measure.text(adaptive):
        return "the same"
    if row.measure.unit == "%":
        return f"{_sign(adaptive - static)}{100 * abs(adaptive - static):.1f} points"
    if static <= 0 or adaptive <= 0:
        return f"{_sign(adaptive - static)}{row.measure.text(abs(adaptive - static))}"
    factor = adaptive / static
    return f"{factor:.2f}× as high" if factor > 1 else f"{1 / factor:.2f}× lower"


def _sign(value: float) -> str:
    return "+" if value > 0 else "−"
