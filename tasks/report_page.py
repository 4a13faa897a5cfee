"""The page of a report: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from resplit.comparison import MEASURES, Measure, Row, change, scenario_changes, verdict
from resplit.reaction import event_reactions, reactions
from resplit.records import RunRecord
from tasks import plot_style
from tasks.reality import REALITY, reality_rows
from tasks.report_decisions import decision_text, recovery_rows
from tasks.report_moves import move_rows
from tasks.simulated_results import SimulatedResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tasks.validate import ValidTelemetry

# "Expected Results" in section IV-D of the paper: of the static and of the adaptive system.
EXPECTED = {
    "latency_mean_s": ("500–1000 ms", "100–300 ms"),
    "utilization": ("50–60 %", "80–95 %"),
    "downtime_incidents_per_hour": ("5–10 /h", "0–2 /h"),
    "qos_met": ("60–70 %", "95–99 %"),
    "privacy_share": ("moderate", "high"),
}
CAPTIONS = {
    "latency": (
        "Latency over time",
        "Each mark is a request at its arrival. Lines are the mean over the requests of the last ten seconds. "
        "Dashed lines are changes of the scenario, triangles are reconfigurations.",
    ),
    "placement": (
        "Which block ran where",
        "The model's blocks run from top to bottom, time from left to right. Each node has one colour.",
    ),
    "qos": (
        "Quality of service over time",
        "Share of the requests offered in the last ten seconds that completed within their service objective.",
    ),
    "utilization": (
        "Utilisation by node",
        "Share of each node in use, by resplit and by other programs; mean over the last five seconds.",
    ),
    "regret": (
        "Simulated: how far from the best",
        "Each bar is the mean latency of a policy over that of an oracle, which knows the scenario and moves at no "
        "cost. It is the mean over the seeds. The thin line is its 95 % interval.",
    ),
    "ablation": (
        "Simulated: what the parts of resplit are worth",
        "Each mark is the mean latency of resplit without one of its parts, over that of the whole resplit with the "
        "same seed. Right of the dashed line, the part makes requests faster. The thin line is the 95 % interval over "
        "the seeds. Where it crosses the dashed line, a gain is not shown.",
    ),
    "energy": (
        "Simulated: latency against energy",
        "Each mark is a policy: its mean latency, and the energy that its nodes use for a request. Mean over the seeds "
        "with 95 % intervals. No policy is better in both than those on the line.",
    ),
    "prediction": (
        "Predicted against measured",
        "For each configuration: the latency predicted when it was chosen, and the mean latency of the requests that "
        "it alone served. The prediction is for the state at that time, so later changes appear as a gap.",
    ),
}
# In the page these colours follow the reader's light or dark setting.
THEMED = {
    plot_style.INK: "var(--ink)",
    plot_style.MUTED: "var(--muted)",
    plot_style.GRID: "var(--grid)",
    "#ffffff": "var(--page)",
    **{colour: f"var(--{label})" for label, colour in plot_style.RUN_COLOURS.items()},
}


@dataclass(frozen=True, eq=False)
class Extras:
    """Content of a report besides its runs.

    `timings` and `prediction_error` come from the functions `block_timings` and `prediction_error` of `resplit.cost`;
    `simulated` is what the simulated study says, by scenario; `replays` are the runs simulated with their
    own requests and placements, by label; `notes` are further sentences as plain text.
    """

    model: str = ""
    dequantised: bool = False
    timings: pd.DataFrame | None = None
    prediction_error: Mapping[str, float] = field(default_factory=dict)
    validation: ValidTelemetry | None = None
    simulated: Mapping[str, SimulatedResults] = field(default_factory=dict)
    replays: Mapping[str, RunRecord] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render(runs: Mapping[str, RunRecord], rows: Sequence[Row], figures: Mapping[str, Figure], extras: Extras) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    record = next(iter(runs.values()))
    simulated = extras.simulated.get(record.scenario)
    page: str = environment.get_template("report.html.j2").render(
        labels=list(runs),
        record=record,
        verdict=verdict(rows),
        rows=[_shown(row, simulated) for row in rows],
        changes=scenario_changes(runs),
        figures=[(name, *CAPTIONS[name], _themed(figures[name], name)) for name in CAPTIONS if name in figures],
        decisions={label: [decision_text(d) for d in run.decisions] for label, run in runs.items() if run.decisions},
        moves={label: moved for label, run in runs.items() if (moved := move_rows(run))},
        reality=reality_rows(runs, extras.replays),
        reality_measures=[each for name in REALITY for each in MEASURES if each.field == name],
        recoveries={label: parts for label, run in runs.items() if (parts := recovery_rows(run.decisions))},
        estimates=_estimate_rows(runs),
        reactions={label: shown for label, run in runs.items() if (shown := _reaction_rows(run))},
        notes=_notes(runs, extras),
        extras=extras,
        simulated=simulated,
        percent=lambda value: f"{100 * value:.1f} %",
    )
    return page


@dataclass(frozen=True)
class ComparisonText:
    """A row of the comparison as the page shows it."""

    measure: Measure
    cells: dict[str, str]
    change: str
    tone: Literal["better", "worse", ""]
    expected: tuple[str, str] | None
    simulated: tuple[str, str] | None  # of the policies static and resplit


def _shown(row: Row, simulated: SimulatedResults | None) -> ComparisonText:
    static, adaptive = row.values.get("static", math.nan), row.values.get("adaptive", math.nan)
    gain = {"lower": static - adaptive, "higher": adaptive - static, "neither": 0.0}[row.measure.better]
    return ComparisonText(
        measure=row.measure,
        cells={label: row.measure.text(value) for label, value in row.values.items()},
        change=change(row),
        tone="better" if gain > 0 else "worse" if gain < 0 else "",
        expected=EXPECTED.get(row.measure.field),
        simulated=None
        if simulated is None
        else (simulated.text("static", row.measure), simulated.text("resplit", row.measure)),
    )


ESTIMATES = {
    "estimate_error_speed": "Speed of nodes",
    "estimate_error_latency": "Latency of links, software included",
    "estimate_error_latency_less_software": "Latency of links, less the software's time for a message",
    "estimate_error_bandwidth": "Bandwidth of links, software included",
    "estimate_error_bandwidth_less_software": "Bandwidth of links, less the software's time for a byte",
}


def _estimate_rows(runs: Mapping[str, RunRecord]) -> list[tuple[str, ...]]:
    """The median errors of the estimate at the end of each run as texts, and the software's time for a message."""
    if not any(run.estimate_errors for run in runs.values()):
        return []
    rows = [
        (label, *(_text(run.estimate_errors.get(name), 100, "%") for run in runs.values()))
        for name, label in ESTIMATES.items()
    ]
    message = (_text(run.estimate_errors.get("software_s"), 1000, "ms") for run in runs.values())
    return [*rows, ("The software's time for a message", *message)]


def _text(value: float | None, factor: float, unit: str) -> str:
    return "-" if value is None else f"{factor * value:.1f} {unit}"


def _reaction_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """The reactions of a run that was asked to decide: when, to what, and the times, as texts."""
    if not run.decisions:
        return []
    found = sorted([*reactions(run), *event_reactions(run)], key=lambda reaction: reaction.from_s)
    return [
        (
            f"{each.from_s:.1f}",
            " ".join((each.what, *each.subjects)),
            *("-" if math.isnan(s) else f"{s:.2f}" for s in (each.noticed_s, each.decided_s, each.live_s)),
        )
        for each in found
    ]


def _themed(figure: Figure, name: str) -> str:
    text = plot_style.svg(figure, name)
    for colour, variable in THEMED.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{CAPTIONS[name][0]}" ', 1)


def _notes(runs: Mapping[str, RunRecord], extras: Extras) -> list[str]:
    """Sentences that a reader needs to interpret the figures."""
    notes = []
    if emulated := sorted({node for record in runs.values() for node in record.emulated_nodes}):
        notes.append(
            f"Emulated hardware: {', '.join(emulated)} are processes on one machine whose compute is padded to "
            "declared times. The ratios between runs are meaningful. The absolute times, and their distance to those "
            "of the paper, are not."
        )
        errors = [record.emulation_error for record in runs.values() if math.isfinite(record.emulation_error)]
        if errors:
            notes.append(
                f"Emulation error: {100 * max(errors):.2f} % (median over segments of |padded / declared − 1|; "
                "the largest of all runs)."
            )
    if extras.dequantised:
        notes.append(
            "The weights are a dequantised 4-bit copy, so the answers differ from those of the original model."
        )
    notes.append(
        "Arrivals, prompts and changes are fixed by the seed before any run. The static run keeps the best plan for "
        "the start. The undisturbed run keeps the same plan, and nothing changes."
    )
    return [*notes, *extras.notes]
