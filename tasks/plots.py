"""The figures of a run, for the report, MLflow and DVC. Knows what to draw, not where it ends up."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from resplit.metrics import completed, epoch_latency, reconfigurations, series, utilization_series
from resplit.records import RunRecord
from resplit.types import segments_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#6a737d", "#dfe3e8"
# Blue and vermilion stay apart for every kind of colour vision; markers and dashes differ too.
RUN_COLOURS = {"static": "#c8501e", "adaptive": "#0b6fb8", "undisturbed": "#868e96"}
RUN_DASHES = {"static": "-", "adaptive": "-", "undisturbed": (0, (4, 2))}
RUN_MARKERS = {"static": "s", "adaptive": "o", "undisturbed": "D"}
OTHER_COLOUR = "#7a5195"
# Tol's "light" scheme: areas under dark text, told apart by all.
NODE_COLOURS = ("#77aadd", "#ee8866", "#eedd88", "#99ddff", "#ffaabb", "#44bb99", "#bbcc33", "#dddddd")
AREA_TEXT = "#1f2329"
WIDTH_IN = 9.6
_TICKS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
}
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """`draw` under this module's style; nobody else's settings change."""

    @functools.wraps(draw)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


@_styled
def latency_figure(runs: Mapping[str, RunRecord], between_s: tuple[float, float] | None = None) -> Figure:
    """Each request's latency by its arrival, the rolling mean over it, changes and reconfigurations marked; all of the
    runs, or what lies `between_s`."""

    def draw(axes: Axes) -> None:
        for label, record in runs.items():
            done = record.requests[completed(record.requests)]
            look = {"color": _colour(label), "marker": RUN_MARKERS.get(label, "^"), "linestyle": "none"}
            axes.plot(done.arrival_s, done.end_s - done.arrival_s, markersize=3, alpha=0.4, markeredgewidth=0, **look)
            _line(axes, label, series(record), "latency_s")
        latencies = [record.requests.end_s - record.requests.arrival_s for record in runs.values()]
        _seconds_axis(axes.yaxis, pd.concat(latencies).dropna())
        axes.set_ylabel("latency by arrival")

    return _over_time(runs, draw, height_in=3.6, between_s=between_s)


@_styled
def qos_figure(runs: Mapping[str, RunRecord]) -> Figure:
    """Share of the requests offered in the last ten seconds that met their objective."""

    def draw(axes: Axes) -> None:
        for label, record in runs.items():
            _line(axes, label, series(record), "qos_met", scale=100.0)
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_ylabel("QoS met")

    return _over_time(runs, draw, height_in=2.5)


@_styled
def utilization_figure(runs: Mapping[str, RunRecord]) -> Figure:
    """Utilisation of each node over time, one small panel per node."""
    nodes = sorted({node for record in runs.values() for node in record.use.node.unique()})
    figure, panels = _figure(max(len(nodes), 1), 1.0 * max(len(nodes), 1) + 0.7)
    for node, axes in zip(nodes, panels, strict=False):
        for label, record in runs.items():
            over_time = utilization_series(record)
            if node in over_time:
                _line(axes, label, over_time, node, scale=100.0)
        axes.set_ylim(0, 104)
        axes.set_yticks([0, 50, 100], ["0", "50", "100 %"])
        axes.set_ylabel(node, rotation=0, ha="right", va="center", labelpad=30, color=INK)
        _mark_changes(axes, runs, numbered=axes is panels[0])
    _time_axis(panels[-1], runs)
    _legend(figure, panels[0])
    return figure


@_styled
def placement_figure(runs: Mapping[str, RunRecord]) -> Figure:
    """Which block ran where: blocks down the side, time along the bottom, colour and name for the node.

    A run that never moved from the first run's only placement would repeat its panel and is left out.
    """
    first = next(iter(runs.values())).epochs.placement.tolist()
    runs = {label: record for k, (label, record) in enumerate(runs.items()) if not k or not _same(record, first)}
    figure, panels = _figure(len(runs), 2.3 * len(runs) + 0.5)
    colours = node_colours(runs.values())
    for (label, record), axes in zip(runs.items(), panels, strict=True):
        for epoch in epoch_latency(record).itertuples():
            until_s = min(epoch.until_s, record.duration_s)
            for segment in segments_of(tuple(epoch.placement.split(","))):
                _box(axes, segment.first, segment.last, epoch.time_s, until_s, colours[segment.node])
                if (until_s - epoch.time_s) > 0.055 * record.duration_s and segment.last - segment.first >= 2:
                    place = (max(epoch.time_s, 0.0) + 0.008 * record.duration_s, (segment.first + segment.last) / 2)
                    axes.text(*place, segment.node, va="center", color=AREA_TEXT, fontsize=9)
        _block_axis(axes, record)
        axes.set_title(label, pad=14, fontweight="bold")
        _mark_changes(axes, {label: record}, numbered=True)
    _time_axis(panels[-1], runs)
    _node_legend(figure, colours)
    return figure


@_styled
def prediction_figure(runs: Mapping[str, RunRecord], timings: pd.DataFrame | None = None) -> Figure:
    """Predicted against measured: latency of each configuration and, where given, the time of each pass.

    `timings` has one row per distinct pass: `node`, `phase`, `predicted_s` and `measured_s`.
    """
    figure, panels = _figure(1, 4.0, columns=2 if timings is not None else 1)
    _configurations(panels[0], runs)
    if timings is not None:
        _block_timings(panels[1], timings, node_colours(runs.values()))
    return figure


def figures(runs: Mapping[str, RunRecord], timings: pd.DataFrame | None = None) -> dict[str, Figure]:
    """Every figure that `runs` (by label) allow, by name."""
    drawn = {"latency": latency_figure(runs), "qos": qos_figure(runs), "placement": placement_figure(runs)}
    drawn["prediction"] = prediction_figure(runs, timings)
    if any(len(record.use) for record in runs.values()):
        drawn["utilization"] = utilization_figure(runs)
    return drawn


def svg(figure: Figure, name: str) -> str:
    """The figure as one `<svg>` element; `name` keeps its ids apart from those of other figures in a page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG on white."""
    figure.savefig(path, dpi=144, transparent=False, facecolor="white", metadata={"Software": None})


def node_colours(records: Iterable[RunRecord]) -> dict[str, str]:
    """A colour for each node that any of the runs placed a block on or sampled, alike in every figure."""
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys(node for placement in record.epochs.placement for node in placement.split(","))
        names |= dict.fromkeys(sorted(record.use.node.unique()))
    return {node: NODE_COLOURS[index % len(NODE_COLOURS)] for index, node in enumerate(names)}


def _figure(rows: int, height_in: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it keeps every figure alive and is not for threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=columns == 1)
    return figure, list(axes.flat)


def _over_time(
    runs: Mapping[str, RunRecord],
    draw: Callable[[Axes], None],
    height_in: float,
    between_s: tuple[float, float] | None = None,
) -> Figure:
    figure, (axes,) = _figure(1, height_in)
    draw(axes)
    _mark_changes(axes, runs, True, between_s or (-np.inf, np.inf))
    _mark_reconfigurations(axes, runs)
    _time_axis(axes, runs, between_s)
    _legend(figure, axes)
    return figure


def _colour(label: str) -> str:
    return RUN_COLOURS.get(label, OTHER_COLOUR)


def _line(axes: Axes, label: str, over_time: pd.DataFrame, column: str, scale: float = 1.0) -> None:
    """One run's line, broken where nothing is known."""
    look = {"color": _colour(label), "linestyle": RUN_DASHES.get(label, ":"), "linewidth": 1.8}
    axes.plot(over_time.time_s, over_time[column] * scale, label=label, **look)


def changes(runs: Mapping[str, RunRecord]) -> list[tuple[float, str]]:
    """What the scenario changed and when, in order. Runs of one scenario share a change, though each made it at a
    moment of its own: the earliest stands for all."""
    earliest: dict[tuple[str, int], float] = {}
    for record in runs.values():
        made = record.events[record.events.kind == "change"].sort_values("time_s")
        for label, time_s, times in zip(made.label, made.time_s, made.groupby("label").cumcount(), strict=True):
            key = (str(label), int(times))
            earliest[key] = min(earliest.get(key, np.inf), float(time_s))
    return sorted((time_s, label) for (label, _), time_s in earliest.items())


def _mark_changes(
    axes: Axes, runs: Mapping[str, RunRecord], numbered: bool, between_s: tuple[float, float] = (-np.inf, np.inf)
) -> None:
    """A dashed line for each change, under its number in the order of all."""
    for number, (time_s, _) in enumerate(changes(runs), 1):
        if not between_s[0] <= time_s <= between_s[1]:
            continue
        axes.axvline(time_s, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1.5)
        if numbered:
            ring = {"boxstyle": "circle,pad=0.18", "facecolor": "none", "edgecolor": MUTED, "linewidth": 0.8}
            place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 7), "textcoords": "offset points"}
            look = {"ha": "center", "va": "center", "fontsize": 7.5, "color": INK, "bbox": ring}
            axes.annotate(str(number), (time_s, 1), **place, **look)


def _mark_reconfigurations(axes: Axes, runs: Mapping[str, RunRecord]) -> None:
    """A triangle on the time axis where an epoch was committed after the first."""
    for label, record in runs.items():
        moves = reconfigurations(record)
        if len(moves):
            on_axis = axes.get_xaxis_transform()
            look = {"marker": "^", "s": 46, "color": _colour(label), "zorder": 4}
            axes.scatter(
                moves.time_s, [0.035] * len(moves), transform=on_axis, label=f"reconfiguration ({label})", **look
            )


def _time_axis(axes: Axes, runs: Mapping[str, RunRecord], between_s: tuple[float, float] | None = None) -> None:
    axes.set_xlim(between_s or (0, max(record.duration_s for record in runs.values())))
    axes.set_xlabel("seconds since the start of the run")


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=5, handlelength=1.6)


def _node_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="none", label=node) for node, colour in colours.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), handlelength=1.0, columnspacing=1.2)


def _seconds_axis(axis: Axis, values: Iterable[float]) -> None:
    """Linear from zero, or logarithmic where the slowest would flatten the rest."""
    known = np.array([value for value in values if value > 0] or [1.0])
    limits = axis.axes.set_ylim if axis.axis_name == "y" else axis.axes.set_xlim
    if np.quantile(known, 0.99) > 6 * np.median(known):
        low, high = known.min() * 0.75, known.max() * 1.35
        (axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale)("log")
        axis.set_minor_formatter(lambda value, _: "")
        axis.set_ticks([tick for tick in _TICKS_S if low <= tick <= high])
        limits(low, high)
    else:
        limits(0, known.max() * 1.08)
    axis.set_major_formatter(lambda value, _: _seconds(value))


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 or value == 0 else f"{value * 1e3:g} ms"


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
    """One line per configuration, from the predicted latency (hollow) to the measured one (filled)."""
    rows = [
        (label, epoch)
        for label, record in runs.items()
        for epoch in epoch_latency(record).dropna(subset=["predicted_latency_s", "measured_latency_s"]).itertuples()
    ]
    for row, (label, epoch) in enumerate(rows):
        ends, colour = (epoch.predicted_latency_s, epoch.measured_latency_s), _colour(label)
        axes.plot(ends, (row, row), color=colour, linewidth=1.4, zorder=2)
        axes.plot(ends[0], row, "o", markersize=7, markerfacecolor="white", markeredgecolor=colour, zorder=3)
        axes.plot(ends[1], row, "o", markersize=7, color=colour, zorder=3)
    values = [value for _, epoch in rows for value in (epoch.predicted_latency_s, epoch.measured_latency_s)]
    axes.set_yticks(range(len(rows)), [f"{label}, epoch {epoch.epoch}" for label, epoch in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _seconds_axis(axes.xaxis, values)
    axes.set_title("Mean latency: predicted (hollow), measured (filled)")


def _block_timings(axes: Axes, timings: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """One point per distinct pass."""
    for node in sorted(timings.node.unique()):
        for phase, marker in (("decode", "o"), ("prefill", "^")):
            rows = timings[(timings.node == node) & (timings.phase == phase)]
            look = {"color": colours.get(node, OTHER_COLOUR), "edgecolors": MUTED, "linewidths": 0.4, "s": 22}
            axes.scatter(
                rows.predicted_s, rows.measured_s, marker=marker, label=node if phase == "decode" else None, **look
            )
    axes.set_title("Time per pass: decode (circles), prefill (triangles)")
    _diagonal(axes, timings[["predicted_s", "measured_s"]])
    axes.legend(loc="upper left", fontsize=8.5)


def _diagonal(axes: Axes, pairs: pd.DataFrame) -> None:
    """Equal logarithmic scales on both axes, with the line on which a prediction is right."""
    low, high = pairs.min().min() / 1.5, pairs.max().max() * 1.5
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="predicted", ylabel="measured")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _seconds(value))
