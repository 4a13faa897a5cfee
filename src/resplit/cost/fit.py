"""The fit of the whole cost model to one window of telemetry."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from resplit.cost.holdout import held_out_contexts, held_out_nodes
from resplit.cost.links import fit_links
from resplit.cost.model import CostModel
from resplit.cost.passes import cells_of, fit_nodes, fit_pooled
from resplit.errors import DataError
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures

__all__ = ["fit_cost_model"]


def fit_cost_model(
    telemetry: Telemetry, features: Sequence[BlockFeatures], previous: CostModel | None = None, *, hold_out: bool = True
) -> CostModel:
    """Fit pass times and links to the window `telemetry`, for the blocks `features`.

    `previous` fills the gaps of the window: kinds of block that a node did not run in it (at the node's present speed),
    and links without messages. `hold_out` also estimates the held-out errors, which takes as long as the fit; without
    it they are those of `previous`, if there is one. DataError if window and `previous` together are not sufficient.
    """
    before = {} if previous is None else previous.reference_s
    reference_s = before | _reference_s(telemetry.nodes)
    if not reference_s:
        raise DataError("no node reports its reference_s, so the speeds of the nodes are unknown")
    kinds = list(dict.fromkeys(feature.kind for feature in features))
    cells = cells_of(telemetry.blocks, features)
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


def _reference_s(nodes: pd.DataFrame) -> dict[str, float]:
    """The median over the reports of each node in the window."""
    medians = nodes.dropna(subset=["reference_s"]).groupby("node")["reference_s"].median()
    return {str(node): float(seconds) for node, seconds in medians.items()}


def _emulated(telemetry: Telemetry, previous: CostModel | None) -> tuple[str, ...]:
    reported = set(telemetry.nodes.loc[telemetry.nodes["emulated"], "node"])
    silent = set(previous.emulated if previous else ()) - set(telemetry.nodes["node"])
    return tuple(sorted(reported | silent))
