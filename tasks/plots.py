"""The figures of a run, for the report, MLflow and DVC."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from resplit.comparison import scenario_changes
from resplit.metrics import completed, measured_epochs, reconfigurations, series, utilization_series
from resplit.records import RunRecord
from resplit.types import segments_of
from tasks.plot_style import (
    AREA_TEXT,
    INK,
    MUTED,
    OTHER_COLOUR,
    RUN_MARKERS,
    draw_line,
    new_figure,
    node_colours,
    node_legend,
    run_colour,
    run_legend,
    seconds_axis,
    seconds_text,
    styled,
    time_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def latency_figure(runs: Mapping[str, RunRecord], between_s: tuple[float, float] | None = None) -> Figure:
    """The latency of each request by its arrival, and its rolling mean, with changes and reconfigurations marked.

    `between_s` limits the figure to an interval of the run.
    """

    def draw(axes: Axes) -> None:
        for label, record in runs.items():
            done = record.requests[completed(record.requests)]
            axes.plot(
                done.arrival_s,
                done.end_s - done.arrival_s,
                color=run_colour(label),
                marker=RUN_MARKERS.get(label, "^"),
                linestyle="none",
                markersize=3,
                markeredgewidth=0,
                alpha=0.4,
            )
            draw_line(axes, label, series(record), "latency_s")
        latencies = [record.requests.end_s - record.requests.arrival_s for record in runs.values()]
        seconds_axis(axes.yaxis, pd.concat(latencies).dropna())
        axes.set_ylabel("latency by arrival")

    return _over_time(runs, draw, height_in=3.6, between_s=between_s)


@styled
def qos_figure(runs: Mapping[str, RunRecord]) -> Figure:
    """Share of the requests offered in the last ten seconds that met their service objective."""

    def draw(axes: Axes) -> None:
        for label, record in runs.items():
            draw_line(axes, label, series(record), "qos_met", scale=100.0)
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_ylabel("QoS met")

    return _over_time(runs, draw, height_in=2.5)


@styled
def utilization_figure(runs: Mapping[str, RunRecord]) -> Figure:
    """Utilisation of each node over time, with one small panel for each node."""
    nodes = sorted({node for record in runs.values() for node in record.use.node.unique()})
    figure, panels = new_figure(max(len(nodes), 1), 1.0 * max(len(nodes), 1) + 0.7)
    for node, axes in zip(nodes, panels, strict=False):
        for label, record in runs.items():
            over_time = utilization_series(record)
            if node in over_time:
                draw_line(axes, label, over_time, node, scale=100.0)
        axes.set_ylim(0, 104)
        axes.set_yticks([0, 50, 100], ["0", "50", "100 %"])
        axes.set_ylabel(node, rotation=0, ha="right", va="center", labelpad=30, color=INK)
        _mark_changes(axes, runs, numbered=axes is panels[0])
    time_axis(panels[-1], runs)
    run_legend(figure, panels[0])
    return figure


@styled
def placement_figure(runs: Mapping[str, RunRecord]) -> Figure:
    """Which block ran where: blocks from top to bottom, time from left to right, one colour for each node.

    A run whose only placement is also the only one of the first run is left out, because its panel would be the same.
    """
    first = next(iter(runs.values())).epochs.placement.tolist()
    runs = {label: record for k, (label, record) in enumerate(runs.items()) if not k or not _same(record, first)}
    figure, panels = new_figure(len(runs), 2.3 * len(runs) + 0.5)
    colours = node_colours(runs.values())
    for (label, record), axes in zip(runs.items(), panels, strict=True):
        for epoch in measured_epochs(record):
            until_s = min(epoch.until_s, record.duration_s)
            for segment in segments_of(epoch.placement):
                _box(axes, segment.first, segment.last, epoch.time_s, until_s, colours[segment.node])
                if (until_s - epoch.time_s) > 0.055 * record.duration_s and segment.last - segment.first >= 2:
                    left_s = max(epoch.time_s, 0.0) + 0.008 * record.duration_s
                    middle = (segment.first + segment.last) / 2
                    axes.text(left_s, middle, segment.node, va="center", color=AREA_TEXT, fontsize=9)
        _block_axis(axes, record)
        axes.set_title(label, pad=14, fontweight="bold")
        _mark_changes(axes, {label: record}, numbered=True)
    time_axis(panels[-1], runs)
    node_legend(figure, colours)
    return figure


@styled
def prediction_figure(runs: Mapping[str, RunRecord], timings: pd.DataFrame | None = None) -> Figure:
    """Predicted against measured: the latency of each configuration and, if given, the time of each pass.

    `timings` has one row for each distinct pass, with `node`, `phase`, `predicted_s` and `measured_s`.
    """
    figure, panels = new_figure(1, 4.0, columns=2 if timings is not None else 1)
    _configurations(panels[0], runs)
    if timings is not None:
        _block_timings(panels[1], timings, node_colours(runs.values()))
    return figure


def figures(runs: Mapping[str, RunRecord], timings: pd.DataFrame | None = None) -> dict[str, Figure]:
    """All figures that can be drawn of `runs` (by label), by name."""
    drawn = {"latency": latency_figure(runs), "qos": qos_figure(runs), "placement": placement_figure(runs)}
    drawn["prediction"] = prediction_figure(runs, timings)
    if any(len(record.use) for record in runs.values()):
        drawn["utilization"] = utilization_figure(runs)
    return drawn


def _over_time(
    runs: Mapping[str, RunRecord],
    draw: Callable[[Axes], None],
    height_in: float,
    between_s: tuple[float, float] | None = None,
) -> Figure:
    figure, (axes,) = new_figure(1, height_in)
    draw(axes)
    _mark_changes(axes, runs, True, between_s or (-np.inf, np.inf))
    _mark_reconfigurations(axes, runs)
    time_axis(axes, runs, between_s)
    run_legend(figure, axes)
    return figure


def _mark_changes(
    axes: Axes, runs: Mapping[str, RunRecord], numbered: bool, between_s: tuple[float, float] = (-np.inf, np.inf)
) -> None:
    """A dashed line for each change, with its number in the order of time."""
    for number, (time_s, _) in enumerate(scenario_changes(runs), 1):
        if not between_s[0] <= time_s <= between_s[1]:
            continue
        axes.axvline(time_s, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1.5)
        if numbered:
            ring = {"boxstyle": "circle,pad=0.18", "facecolor": "none", "edgecolor": MUTED, "linewidth": 0.8}
            axes.annotate(
                str(number),
                (time_s, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=7.5,
                color=INK,
                bbox=ring,
            )


def _mark_reconfigurations(axes: Axes, runs: Mapping[str, RunRecord]) -> None:
    """A triangle on the time axis for each reconfiguration."""
    for label, record in runs.items():
        moves = reconfigurations(record)
        if len(moves):
            on_axis = axes.get_xaxis_transform()
            axes.scatter(
                moves.time_s,
                [0.035] * len(moves),
                s=46,
                color=run_colour(label),
                marker="^",
                zorder=4,
                transform=on_axis,
                label=f"reconfiguration ({label})",
            )


def _box(axes: Axes, first: int, last: int, from_s: float, until_s: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((from_s, first - 0.5), until_s - from_s, last - first + 1, facecolor=colour, edgecolor="white")
    box.set_linewidth(0.8)
    axes.add_patch(box)


def _block_axis(axes: Axes, record: RunRecord) -> None:
    names = record.blocks or tuple(str(index) for index in range(_block_count(record)))
    axes.set_ylim(len(names) - 0.5, -0.5)
    shown = sorted({*range(0, len(names) - 2, max(1, len(names) // 6)), len(names) - 1})
    axes.set_yticks(shown, [names[index] for index in shown])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _same(record: RunRecord, placements: list[str]) -> bool:
    return len(placements) == 1 and record.epochs.placement.tolist() == placements


def _block_count(record: RunRecord) -> int:
    return max((placement.count(",") + 1 for placement in record.epochs.placement), default=1)


def _configurations(axes: Axes, runs: Mapping[str, RunRecord]) -> None:
    """One line for each configuration, from the predicted latency (hollow) to the measured one (filled)."""
    rows = [
        (label, epoch)
        for label, record in runs.items()
        for epoch in measured_epochs(record)
        if math.isfinite(epoch.predicted_latency_s) and math.isfinite(epoch.measured_latency_s)
    ]
    for row, (label, epoch) in enumerate(rows):
        ends, colour = (epoch.predicted_latency_s, epoch.measured_latency_s), run_colour(label)
        axes.plot(ends, (row, row), color=colour, linewidth=1.4, zorder=2)
        axes.plot(ends[0], row, "o", markersize=7, markerfacecolor="white", markeredgecolor=colour, zorder=3)
        axes.plot(ends[1], row, "o", markersize=7, color=colour, zorder=3)
    values = [value for _, epoch in rows for value in (epoch.predicted_latency_s, epoch.measured_latency_s)]
    axes.set_yticks(range(len(rows)), [f"{label}, epoch {epoch.epoch}" for label, epoch in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    seconds_axis(axes.xaxis, values)
    axes.set_title("Mean latency: predicted (hollow), measured (filled)")


def _block_timings(axes: Axes, timings: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """One point for each distinct pass."""
    for node in sorted(timings.node.unique()):
        for phase, marker in (("decode", "o"), ("prefill", "^")):
            rows = timings[(timings.node == node) & (timings.phase == phase)]
            axes.scatter(
                rows.predicted_s,
                rows.measured_s,
                s=22,
                color=colours.get(node, OTHER_COLOUR),
                marker=marker,
                edgecolors=MUTED,
                linewidths=0.4,
                label=node if phase == "decode" else None,
            )
    axes.set_title("Time per pass: decode (circles), prefill (triangles)")
    _diagonal(axes, timings[["predicted_s", "measured_s"]])
    axes.legend(loc="upper left", fontsize=8.5)


def _diagonal(axes: Axes, pairs: pd.DataFrame) -> None:
    """Equal logarithmic scales on both axes, with the line on which predictions are exact."""
    low, high = pairs.min().min() / 1.5, pairs.max().max() * 1.5
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="predicted", ylabel="measured")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: seconds_text(value))
