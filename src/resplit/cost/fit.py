"""The fit of the whole cost model to one window of telemetry.

A node may have become slower or faster within the window. A model that mixes both times is right for neither, and
later windows would count from it. So each node is fitted to what came after its last jump.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd

from resplit.cost.holdout import held_out_contexts, held_out_nodes
from resplit.cost.links import fit_links
from resplit.cost.model import CostModel
from resplit.cost.passes import cells_of, fit_nodes, fit_pooled
from resplit.errors import DataError
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures

__all__ = ["SpeedJump", "fit_cost_model"]


@dataclass(frozen=True)
class SpeedJump:
    """A node became slower or faster at `at_s` (seconds since 1970, as in telemetry).

    Its times are now `factor` times those of the model that was known then.
    """

    at_s: float
    factor: float


_NO_JUMPS: Mapping[str, SpeedJump] = MappingProxyType({})


def fit_cost_model(
    telemetry: Telemetry,
    features: Sequence[BlockFeatures],
    previous: CostModel | None = None,
    *,
    hold_out: bool = True,
    jumps: Mapping[str, SpeedJump] = _NO_JUMPS,
) -> CostModel:
    """Fit pass times and links to the window `telemetry`, for the blocks `features`.

    `previous` fills the gaps of the window: kinds of block that a node did not run in it (at the node's present speed),
    and links without messages. `jumps` holds the last jump of each node that jumped: what came before says nothing.
    `hold_out` also estimates the held-out errors, which takes as long as the fit; without it they are those of
    `previous`, if there is one. DataError if window and `previous` together are not sufficient.
    """
    before = {} if previous is None else previous.reference_s
    nodes, blocks = _after(telemetry.nodes, jumps), _after(telemetry.blocks, jumps)
    drift = {} if previous is None else _unknown_to(previous, jumps)
    moved = {node: seconds * drift.get(node, 1.0) for node, seconds in before.items()}
    reference_s = moved | _reference_s(nodes)
    if not reference_s:
        raise DataError("no node reports its reference_s, so the speeds of the nodes are unknown")
    kinds = list(dict.fromkeys(feature.kind for feature in features))
    cells = cells_of(blocks, features)
    known = {} if previous is None else {(fit.node, fit.phase, fit.kind): fit for fit in previous.passes}
    pooled = fit_pooled(cells, kinds, reference_s, known)
    fitted = fit_nodes(cells, kinds, reference_s, pooled, known, before, drift)
    kept = None if hold_out else previous
    newest = telemetry.nodes if len(telemetry.nodes) else telemetry.blocks
    return CostModel(
        fitted_at_s=float(newest["time_s"].max()),
        reference_s=reference_s,
        passes=(*pooled.values(), *fitted.values()),
        links=fit_links(telemetry.links, () if previous is None else previous.links),
        held_out_contexts=kept.held_out_contexts if kept else held_out_contexts(cells, kinds, reference_s),
        held_out_nodes=kept.held_out_nodes if kept else held_out_nodes(cells, kinds, reference_s),
        emulated=_emulated(telemetry, previous),
    )


def _unknown_to(model: CostModel, jumps: Mapping[str, SpeedJump]) -> dict[str, float]:
    """The factor of each node that jumped after the telemetry of `model`."""
    return {node: jump.factor for node, jump in jumps.items() if jump.at_s > model.fitted_at_s}


def _after(rows: pd.DataFrame, jumps: Mapping[str, SpeedJump]) -> pd.DataFrame:
    """The rows of each node after its jump."""
    if not jumps or rows.empty:
        return rows
    since_s = rows["node"].map({node: jump.at_s for node, jump in jumps.items()}).fillna(-math.inf)
    return rows[rows["time_s"] > since_s]


def _reference_s(nodes: pd.DataFrame) -> dict[str, float]:
    """The median over the reports of each node in the window."""
    medians = nodes.dropna(subset=["reference_s"]).groupby("node")["reference_s"].median()
    return {str(node): float(seconds) for node, seconds in medians.items()}


def _emulated(telemetry: Telemetry, previous: CostModel | None) -> tuple[str, ...]:
    reported = set(telemetry.nodes.loc[telemetry.nodes["emulated"], "node"])
    silent = set(previous.emulated if previous else ()) - set(telemetry.nodes["node"])
    return tuple(sorted(reported | silent))
