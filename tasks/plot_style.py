"""The look of the figures: colours, line styles, axes and legends, and how a figure is saved."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from resplit.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#6a737d", "#dfe3e8"
# Blue and vermilion can be distinguished with any colour vision; markers and dashes differ as well.
RUN_COLOURS = {"static": "#c8501e", "adaptive": "#0b6fb8", "undisturbed": "#868e96"}
RUN_DASHES = {"static": "-", "adaptive": "-", "undisturbed": (0, (4, 2))}
RUN_MARKERS = {"static": "s", "adaptive": "o", "undisturbed": "D"}
OTHER_COLOUR = "#7a5195"
# Tol's "light" scheme, for areas under dark text; it suits any colour vision.
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


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """`draw` with the style of this module; the global settings of matplotlib do not change."""

    @functools.wraps(draw)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def svg(figure: Figure, name: str) -> str:
    """The figure as one `<svg>` element. `name` is put before its ids, so that they are unique in a page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file with a white background."""
    figure.savefig(path, dpi=144, transparent=False, facecolor="white", metadata={"Software": None})


def node_colours(records: Iterable[RunRecord]) -> dict[str, str]:
    """A colour for each node that holds a block or was sampled in any of the runs; the same in all figures."""
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys(node for placement in record.epochs.placement for node in placement.split(","))
        names |= dict.fromkeys(sorted(record.use.node.unique()))
    return {node: NODE_COLOURS[index % len(NODE_COLOURS)] for index, node in enumerate(names)}


def new_figure(rows: int, height_in: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `height_in` inches with `rows` x `columns` axes; axes in one column share their x axis."""
    # pyplot keeps every figure alive and is not thread-safe, so it is not used.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=columns == 1)
    return figure, list(axes.flat)


def run_colour(label: str) -> str:
    return RUN_COLOURS.get(label, OTHER_COLOUR)


def draw_line(axes: Axes, label: str, over_time: pd.DataFrame, column: str, scale: float = 1.0) -> None:
    """The line of one run, with gaps where values are NaN."""
    axes.plot(
        over_time.time_s,
        over_time[column] * scale,
        color=run_colour(label),
        linestyle=RUN_DASHES.get(label, ":"),
        linewidth=1.8,
        label=label,
    )


def time_axis(axes: Axes, runs: Mapping[str, RunRecord], between_s: tuple[float, float] | None = None) -> None:
    axes.set_xlim(between_s or (0, max(record.duration_s for record in runs.values())))
    axes.set_xlabel("seconds since the start of the run")


def run_legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=5, handlelength=1.6)


def node_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="none", label=node) for node, colour in colours.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), handlelength=1.0, columnspacing=1.2)


def seconds_axis(axis: Axis, values: Iterable[float]) -> None:
    """A linear axis from zero, or a logarithmic one if a few large values would compress the others."""
    known = np.array([value for value in values if value > 0] or [1.0])
    vertical = axis is axis.axes.yaxis
    limits = axis.axes.set_ylim if vertical else axis.axes.set_xlim
    if np.quantile(known, 0.99) > 6 * np.median(known):
        low, high = known.min() * 0.75, known.max() * 1.35
        (axis.axes.set_yscale if vertical else axis.axes.set_xscale)("log")
        axis.set_minor_formatter(lambda value, _: "")
        axis.set_ticks([tick for tick in _TICKS_S if low <= tick <= high])
        limits(low, high)
    else:
        limits(0, known.max() * 1.08)
    axis.set_major_formatter(lambda value, _: seconds_text(value))


def seconds_text(value: float) -> str:
    return f"{value:g} s" if value >= 1 or value == 0 else f"{value * 1e3:g} ms"
