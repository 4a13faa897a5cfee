"""Report: write a study's page, its metrics as JSON and its series as CSV files for DVC."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.comparison import compare, run_label, summaries, with_other_runs
from resplit.errors import DataError
from resplit.intervals import study_metrics
from resplit.metrics import RunMetrics, epoch_latency, series, summarise
from resplit.records import RunRecord
from tasks import plot_style, plots
from tasks.report_page import Extras, render
from tasks.simulated_results import simulated_figures

__all__ = ["Extras", "report", "write_report", "write_study_metrics"]

_PAIR = ("", "_ci95")


@task(name="report", cache_policy=NO_CACHE)
def report(runs: Sequence[RunRecord], folder: Path, extras: Extras | None = None) -> Path:
    """`write_report` as a task."""
    return write_report(runs, folder, extras)


def write_report(runs: Sequence[RunRecord], folder: Path, extras: Extras | None = None) -> Path:
    """Write `index.html`, `metrics.json` and `plots/` into `folder`; returns the path of the page.

    `runs` holds one run for each policy and scenario. DataError if there is none, or if two have the same label.
    """
    if not runs:
        raise DataError("there is no run to report on")
    extras = extras or Extras()
    metrics = summaries(list(runs))
    by_label = {label: next(run for run in runs if run_label(run) == label) for label in metrics}
    figures = plots.figures(by_label, extras.timings)
    figures |= simulated_figures(extras.simulated, runs[0].scenario)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    _write_metrics(folder / "metrics.json", metrics)
    _write_series(folder / "plots", by_label)
    for name, figure in figures.items():
        (folder / "plots" / f"{name}.svg").write_text(plot_style.svg(figure, name), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(render(by_label, compare(metrics), figures, extras), encoding="utf-8")
    return page


def write_study_metrics(runs: Mapping[str, Mapping[int, RunRecord]], folder: Path) -> Path:
    """Write `metrics.json` over several seeds: each mean, and beside it half of its interval as `NAME_ci95`.

    `runs` has the records of each policy, by its label, and seed. Returns the path of the file.
    """
    metrics: dict[str, dict[int, RunMetrics]] = {}
    for seed in sorted({seed for seeds in runs.values() for seed in seeds}):
        of_seed = {label: summarise(seeds[seed]) for label, seeds in runs.items() if seed in seeds}
        for label, values in with_other_runs(of_seed).items():
            metrics.setdefault(label, {})[seed] = values
    path = folder / "metrics.json"
    _write_json(
        path,
        {
            label: {
                f"{name}{ending}": value
                for name, pair in values.items()
                for ending, value in zip(_PAIR, pair, strict=True)
            }
            for label, values in study_metrics(metrics).items()
        },
    )
    return path


def _write_metrics(path: Path, metrics: Mapping[str, RunMetrics]) -> None:
    _write_json(path, {label: asdict(values) for label, values in metrics.items()})


def _write_json(path: Path, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """All metrics of all runs, rounded and sorted, with null for NaN. Equal metrics give equal files."""
    plain = {
        label: {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}
        for label, values in metrics.items()
    }
    path.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _write_series(folder: Path, runs: Mapping[str, RunRecord]) -> None:
    """`<run>.csv` with the series of each run; `epochs.csv` with predicted and measured latency of all epochs."""
    for label, record in runs.items():
        series(record).to_csv(folder / f"{label}.csv", index=False, float_format="%.6f")
    columns = ["epoch", "action", "time_s", "until_s", "predicted_latency_s", "measured_latency_s", "requests"]
    parts = [epoch_latency(record)[columns].assign(run=label) for label, record in runs.items()]
    pd.concat(parts).to_csv(folder / "epochs.csv", index=False, float_format="%.6f")
