"""Held-out errors of the cost model: on longer contexts than it was fitted to, and on nodes without timings.

The model is fitted again without that data. Holding out random rows would give errors that are too small, because
thirty equal layers predict one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from resplit.cost.model import PredictionError
from resplit.cost.passes import fit_nodes, fit_pooled, predicted_s
from resplit.errors import DataError

__all__ = ["held_out_contexts", "held_out_nodes"]

LONGEST = 0.2  # share of the passes of each node, phase and kind that is held out; the longest passes are taken


def held_out_contexts(cells: pd.DataFrame, kinds: Sequence[str], reference_s: Mapping[str, float]) -> PredictionError:
    """The error on the longest passes of each node, phase and kind, of a fit to the shorter ones."""
    limit = cells.groupby(["node", "phase", "kind"])["length"].transform(lambda length: length.quantile(1 - LONGEST))
    longest = (cells["length"] > limit) & cells["node"].isin(reference_s)
    if not longest.any():
        return PredictionError(None, None, 0)
    shorter = cells[~longest]
    pooled = fit_pooled(shorter, kinds, reference_s, {})
    models = fit_nodes(shorter, kinds, reference_s, pooled, {}, {}, {})
    held = cells[longest]
    return PredictionError.of(predicted_s(held, models), held["seconds"].to_numpy())


def held_out_nodes(cells: pd.DataFrame, kinds: Sequence[str], reference_s: Mapping[str, float]) -> PredictionError:
    """The error on each node's passes, predicted from the passes of the other nodes and its own `reference_s` only.

    Kinds of pass that no other node ran are left out, because the other nodes cannot predict them.
    """
    predicted, measured = [np.array([])], [np.array([])]
    for node in sorted(set(cells["node"]) & set(reference_s)):
        others = cells[cells["node"] != node]
        held = cells[(cells["node"] == node) & _passes(cells).isin(_passes(others))]
        try:
            pooled = fit_pooled(others, kinds, reference_s, {})
        except DataError:
            continue  # the other nodes have no rows of some phase, so they cannot predict this node
        models = fit_nodes(others, kinds, {node: reference_s[node]}, pooled, {}, {}, {})
        predicted.append(predicted_s(held, models))
        measured.append(held["seconds"].to_numpy())
    return PredictionError.of(np.concatenate(predicted), np.concatenate(measured))


def _passes(cells: pd.DataFrame) -> pd.Series[str]:
    """The kind of pass of each cell."""
    return cells["phase"] + " " + cells["kind"]
