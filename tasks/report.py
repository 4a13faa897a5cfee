"""The report of a study: one HTML page that stands alone, its numbers as JSON, its series as CSV for DVC.

Knows how results are shown; what they are is said by `resplit.metrics`, how they look by `tasks.plots`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.comparison import Row, change, compare, run_label, summaries, verdict
from resplit.errors import DataError
from resplit.metrics import RunMetrics, epoch_latency, series
from resplit.records import RunRecord
from tasks import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resplit.cost import CostModel
    from resplit.telemetry import Telemetry
    from resplit.types import BlockFeatures
    from tasks.validate import ValidTelemetry

# Section IV-D, "Expected Results", of the paper: static, adaptive.
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
        "Each mark is a request, by its arrival; lines are the mean of those that arrived in the last ten seconds. "
        "Dashed verticals are what the scenario changed, triangles are reconfigurations.",
    ),
    "placement": (
        "Which block ran where",
        "The model's blocks from top to bottom, time from left to right, one colour for each node.",
    ),
    "qos": (
        "Quality of service over time",
        "Share of the requests offered in the last ten seconds that ended rightly within their objective.",
    ),
    "utilization": (
        "Utilisation by node",
        "Share of each node in use, by resplit and by others, mean of the last five seconds.",
    ),
    "prediction": (
        "Predicted against measured",
        "Latency: what the plan promised for each configuration when it was chosen, and the mean of the requests that "
        "it alone served. The prediction knows only the state at that moment; what changed later shows as a gap.",
    ),
}
# In the page these follow the reader's light or dark setting.
THEMED = {
    plots.INK: "var(--ink)",
    plots.MUTED: "var(--muted)",
    plots.GRID: "var(--grid)",
    "#ffffff": "var(--page)",
    **{colour: f"var(--{label})" for label, colour in plots.RUN_COLOURS.items()},
}


@dataclass(frozen=True, eq=False)
class Extras:
    """What a report can say beyond its runs. `timings` and `prediction_error` are what `block_timings` and the function
    `prediction_error` give; `notes` are further sentences, as plain text."""

    model: str = ""
    dequantised: bool = False
    timings: pd.DataFrame | None = None
    prediction_error: Mapping[str, float] = field(default_factory=dict)
    validation: ValidTelemetry | None = None
    notes: Sequence[str] = ()


def write_report(runs: Sequence[RunRecord], folder: Path, extras: Extras | None = None) -> Path:
    """Write `index.html`, `metrics.json` and `plots/` into `folder`; returns the page.

    `runs` holds one run of each policy and scenario; DataError if there is none, or two of one name.
    """
    if not runs:
        raise DataError("no run to report on")
    extras = extras or Extras()
    metrics = summaries(list(runs))
    by_label = {label: next(run for run in runs if run_label(run) == label) for label in metrics}
    figures = plots.figures(by_label, extras.timings)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    _write_metrics(folder / "metrics.json", metrics)
    _write_series(folder / "plots", by_label)
    for name, figure in figures.items():
        (folder / "plots" / f"{name}.svg").write_text(plots.svg(figure, name), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(render(by_label, compare(metrics), figures, extras), encoding="utf-8")
    return page


@task(name="report", cache_policy=NO_CACHE)
def report(runs: Sequence[RunRecord], folder: Path, extras: Extras | None = None) -> Path:
    """`write_report` as a task."""
    return write_report(runs, folder, extras)


def block_timings(model: CostModel, telemetry: Telemetry, features: Sequence[BlockFeatures]) -> pd.DataFrame:
    """Predicted beside measured seconds of each distinct pass in `telemetry`, for `Extras.timings`.

    Telemetry that the model was not fitted to makes this a test of the model; its own shows how well it fits.
    """
    from resplit.cost.passes import cells_of, predicted_s

    cells = cells_of(telemetry.blocks, features)
    predicted = predicted_s(cells, {(fit.node, fit.phase, fit.kind): fit for fit in model.passes})
    timings = cells[["node", "phase", "kind"]].assign(predicted_s=predicted, measured_s=cells["seconds"])
    return timings.dropna(ignore_index=True)


def prediction_error(model: CostModel) -> dict[str, float]:
    """The errors of the cost model on what it was not fitted to, for `Extras.prediction_error`."""
    held_out = {
        "longer contexts, median": model.held_out_contexts.median,
        "longer contexts, p90": model.held_out_contexts.p90,
        "nodes without block timings, median": model.held_out_nodes.median,
        "nodes without block timings, p90": model.held_out_nodes.p90,
    }
    return {what: error for what, error in held_out.items() if error is not None}


def render(runs: Mapping[str, RunRecord], rows: Sequence[Row], figures: Mapping[str, Figure], extras: Extras) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        labels=list(runs),
        record=next(iter(runs.values())),
        verdict=verdict(rows),
        rows=[_shown(row) for row in rows],
        changes=plots.changes(runs),
        figures=[(name, *CAPTIONS[name], _themed(figures[name], name)) for name in CAPTIONS if name in figures],
        decisions={label: [_decision(d) for d in run.decisions] for label, run in runs.items() if run.decisions},
        recoveries={label: rows for label, run in runs.items() if (rows := recoveries(run.decisions))},
        notes=_notes(runs, extras),
        extras=extras,
        percent=lambda value: f"{100 * value:.1f} %",
    )


def _shown(row: Row) -> dict[str, Any]:
    """A row of the table as the page shows it."""
    static, adaptive = row.values.get("static", math.nan), row.values.get("adaptive", math.nan)
    gain = {"lower": static - adaptive, "higher": adaptive - static, "neither": 0.0}[row.measure.better]
    return {
        "measure": row.measure,
        "cells": {label: row.measure.text(value) for label, value in row.values.items()},
        "change": change(row),
        "tone": "better" if gain > 0 else "worse" if gain < 0 else "",
        "expected": EXPECTED.get(row.measure.field),
    }


def _themed(figure: Figure, name: str) -> str:
    text = plots.svg(figure, name)
    for colour, variable in THEMED.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{CAPTIONS[name][0]}" ', 1)


def recoveries(decisions: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What each loss of nodes took, in the order of its parts, from the decisions that recovered from one."""
    rows = []
    for decision in decisions:
        outcome = decision.get("outcome") or {}
        sessions = outcome.get("sessions") if decision.get("action") == "recover" else None
        if not sessions:
            continue
        parts = {"noticed": sessions["noticed_s"], "plan": outcome.get("plan_s"), "load": outcome.get("prepare_s")}
        parts |= {"restore": sessions["restore_s"], "replay": sessions["replay_s"]}
        rows.append(
            {"what": str(decision.get("reason", "")), "sessions": str(sessions["sessions"])}
            | {part: _ms(seconds) for part, seconds in parts.items()}
            | {
                "positions restored": str(sessions["restored_positions"]),
                "replayed": str(sessions["replayed_positions"]),
                "MB carried": f"{sessions['cache_bytes'] / 1e6:.1f}",
            }
        )
    return rows


def _decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the decision log as a row; what an entry does not say stays empty."""
    chosen = decision.get("action") or (decision.get("chosen") or {}).get("action") or ""
    return {
        "at_s": decision.get("at_s"),
        "action": chosen,
        "seen": _seen(decision),
        "alternatives": [_alternative(option, chosen) for option in decision.get("alternatives") or []],
        "reason": "; ".join(str(decision[key]) for key in ("urgent", "reason") if decision.get(key)),
    }


def _seen(decision: Mapping[str, Any]) -> list[str]:
    rates = ", ".join(f"{name} {rate:.2f}/s" for name, rate in (decision.get("rates_rps") or {}).items())
    nodes = decision.get("nodes") or []
    busy = [n for n in nodes if n.get("usable", True) and (n.get("background_utilization") or 0) >= 0.1]
    lost = [str(node["name"]) for node in nodes if not node.get("usable", True)]
    measured = decision.get("measured") or {}
    said = [f"load {rates}"] if rates else []
    if measured:
        said.append(f"latency {_ms(measured.get('latency_s'))} over {measured.get('requests')} requests")
    if measured.get("slo_missed"):
        said.append(f"objective missed: {', '.join(measured['slo_missed'])}")
    said += [f"others use {100 * node['background_utilization']:.0f} % of {node['name']}" for node in busy]
    return said + ([f"lost: {', '.join(lost)}"] if lost else [])


def _alternative(option: Mapping[str, Any], chosen: str) -> dict[str, Any]:
    if option.get("placement") is None:
        told = f"none: {option.get('reason') or 'no plan'}"
    else:
        told = f"{_ms(option.get('latency_s'))}, net gain {_number(option.get('net_gain'))}"
        moved = (option.get("weight_bytes") or 0) + (option.get("cache_bytes") or 0)
        told += f", moves {moved / 1e6:.0f} MB, pause {_ms(option.get('pause_s'))}" if moved else ""
    return {"action": option.get("action"), "told": told, "chosen": option.get("action") == chosen}


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:.0f} ms"


def _number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.1f}"


def _notes(runs: Mapping[str, RunRecord], extras: Extras) -> list[str]:
    """What a reader must know to judge the figures."""
    notes = []
    if emulated := sorted({node for record in runs.values() for node in record.emulated_nodes}):
        notes.append(
            f"Emulated hardware: {', '.join(emulated)} are processes on one machine, padded to declared times. "
            "Ratios between the runs count; the absolute times, and so the distance to the paper's, mean little."
        )
        errors = [record.emulation_error for record in runs.values() if math.isfinite(record.emulation_error)]
        if errors:
            notes.append(
                f"Emulation error: {100 * max(errors):.2f} % (median over segments of |padded / declared − 1|, "
                "the largest of the runs)."
            )
    if extras.dequantised:
        notes.append("The model's weights are a dequantised 4-bit copy: its answers are not those of the original.")
    notes.append(
        "Arrivals, prompts and changes are fixed by the seed before any run; static is the best plan for the start, "
        "kept; undisturbed is the same plan where nothing changes."
    )
    return [*notes, *extras.notes]


def _write_metrics(path: Path, metrics: Mapping[str, RunMetrics]) -> None:
    """All metrics of all runs, rounded alike and sorted, NaN as null: the same numbers give the same file."""
    plain = {
        label: {name: round(value, 6) if math.isfinite(value) else None for name, value in asdict(values).items()}
        for label, values in metrics.items()
    }
    path.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _write_series(folder: Path, runs: Mapping[str, RunRecord]) -> None:
    """`<run>.csv` over time, and `epochs.csv`: predicted against measured of all configurations."""
    for label, record in runs.items():
        series(record).to_csv(folder / f"{label}.csv", index=False, float_format="%.6f")
    columns = ["epoch", "action", "time_s", "until_s", "predicted_latency_s", "measured_latency_s", "requests"]
    parts = [epoch_latency(record)[columns].assign(run=label) for label, record in runs.items()]
    pd.concat(parts).to_csv(folder / "epochs.csv", index=False, float_format="%.6f")
