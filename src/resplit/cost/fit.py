"""The fit of the whole cost model to one window of telemetry.

A node may have become slower or faster within the window. A model that mixes both times is right for neither, and
later windows would count from it. So each node is fitted to what came after its last jump.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from resplit.cost.holdout import held_out_contexts, held_out_nodes
from resplit.cost.links import fit_links
from resplit.cost.model import CostModel
from resplit.cost.passes import cells_of, fit_nodes, fit_pooled
from resplit.errors import DataError
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures

__all__ = ["fit_cost_model"]

_JUMP = math.log(1.2)  # of a reference time, relative to the newest ones
_NEWEST = 3  # reports whose median is the present reference time: one may be late


def fit_cost_model(
    telemetry: Telemetry, features: Sequence[BlockFeatures], previous: CostModel | None = None, *, hold_out: bool = True
) -> CostModel:
    """Fit pass times and links to the window `telemetry`, for the blocks `features`.

    `previous` fills the gaps of the window: kinds of block that a node did not run in it (at the node's present speed),
    and links without messages. `hold_out` also estimates the held-out errors, which takes as long as the fit; without
    it they are those of `previous`, if there is one. DataError if window and `previous` together are not sufficient.
    """
    before = {} if previous is None else previous.reference_s
    since_s = _jumps_s(telemetry.nodes)
    reference_s = before | _reference_s(_after(telemetry.nodes, since_s))
    if not reference_s:
        raise DataError("no node reports its reference_s, so the speeds of the nodes are unknown")
    kinds = list(dict.fromkeys(feature.kind for feature in features))
    cells = cells_of(_after(telemetry.blocks, since_s), features)
    known = {} if previous is None else {(fit.node, fit.phase, fit.kind): fit for fit in previous.passes}
    pooled = fit_pooled(cells, kinds, reference_s, known)
    nodes = fit_nodes(cells, kinds, reference_s, pooled, known, before)
    if hold_out or previous is None:
        errors = held_out_contexts(cells, kinds, reference_s), held_out_nodes(cells, kinds, reference_s)
    else:
        errors = previous.held_out_contexts, previous.held_out_nodes
    return CostModel(
        fitted_at_s=float(
            telemetry.nodes["time_s"].max() if len(telemetry.nodes) else telemetry.blocks["time_s"].max()
        ),
        reference_s=reference_s,
        passes=(*pooled.values(), *nodes.values()),
        links=fit_links(telemetry.links, () if previous is None else previous.links),
        held_out_contexts=errors[0],
        held_out_nodes=errors[1],
        emulated=_emulated(telemetry, previous),
    )


def _jumps_s(nodes: pd.DataFrame) -> dict[str, float]:
    """The time of the first report after the last jump of each node that jumped.

    A reference time before a jump is unlike the newest ones in two reports one after the other: one may be late.
    """
    known = nodes.dropna(subset=["reference_s"])
    jumps_s: dict[str, float] = {}
    for node, at in known.groupby("node").indices.items():
        times_s, logs = known["time_s"].to_numpy()[at], np.log(known["reference_s"].to_numpy()[at])
        order = np.argsort(times_s, kind="stable")
        apart = np.abs(logs[order] - np.median(logs[order][-_NEWEST:])) > _JUMP
        twice = np.flatnonzero(apart[1:] & apart[:-1]) + 1
        if len(twice) and twice[-1] + 1 < len(order):
            jumps_s[str(node)] = float(times_s[order][twice[-1] + 1])
    return jumps_s


def _after(rows: pd.DataFrame, since_s: Mapping[str, float]) -> pd.DataFrame:
    """The rows of each node from its jump on."""
    if not since_s or rows.empty:
        return rows
    return rows[rows["time_s"] >= rows["node"].map(since_s).fillna(-math.inf)]


def _reference_s(nodes: pd.DataFrame) -> dict[str, float]:
    """The median over the reports of each node in the window."""
    medians = nodes.dropna(subset=["reference_s"]).groupby("node")["reference_s"].median()
    return {str(node): float(seconds) for node, seconds in medians.items()}


def _emulated(telemetry: Telemetry, previous: CostModel | None) -> tuple[str, ...]:
    reported = set(telemetry.nodes.loc[telemetry.nodes["emulated"], "node"])
    silent = set(previous.emulated if previous else ()) - set(telemetry.nodes["node"])
    return tuple(sorted(reported | silent))
