"""The fit of pass times for each node, phase and kind of block, with a pooled model as the guess for sparse data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pandas as pd

from resplit.cost.features import COLUMNS, design
from resplit.cost.model import PHASES, PassKey, PassModel
from resplit.cost.robust import GUESS_ROWS, huber_nonnegative
from resplit.errors import DataError
from resplit.types import BlockFeatures, FloatArray

__all__ = ["PassModels", "cells_of", "fit_nodes", "fit_pooled", "predicted_s"]

FEWEST_ROWS = 5  # with fewer rows the guess is kept, because one pass that hung would decide the fit
# The node's own model of the last window weighs as much as so many rows: a few seconds of service, in which some passes
# were late, must not change the parts of the model one by one.
OWN_ROWS = 4.0
_TIMED_AGAIN = math.log(1.1)  # a reference that changed by less does not tell of a jump
CONTEXT_STEP = 16  # tokens; passes with contexts in the same step share a cell

PassModels = Mapping[PassKey, PassModel]


def cells_of(blocks: pd.DataFrame, features: Sequence[BlockFeatures]) -> pd.DataFrame:
    """The cells of `blocks` (columns `telemetry.BLOCK_COLUMNS`): one row for all passes that require the same work.

    Columns: node, phase, kind, `length` (mean tokens in a cache after the pass), the median `seconds`, the number of
    `rows`, and those of `design`. Equal blocks share a cell, because thirty equal layers are one observation repeated.
    DataError for an unknown block.
    """
    by_name = {feature.name: feature for feature in features}
    if unknown := sorted(set(blocks["block"]) - set(by_name)):
        raise DataError(f"there are timings of block {unknown[0]!r}, which this model does not have")
    shapes: dict[tuple[object, ...], int] = {}
    shape_of = {name: shapes.setdefault(_shape(feature), len(shapes)) for name, feature in by_name.items()}
    keyed = blocks.assign(shape=blocks["block"].map(shape_of), step=blocks["context_tokens"] // CONTEXT_STEP)
    groups = keyed.groupby(["node", "phase", "kind", "shape", "tokens", "sessions", "step"], sort=True)
    cells = groups.agg(
        seconds=("seconds", "median"),
        context_tokens=("context_tokens", "mean"),
        rows=("seconds", "size"),
        block=("block", "first"),
    ).reset_index()
    cells[list(COLUMNS)] = _design(cells, by_name)
    return cells.assign(length=cells["tokens"] / cells["sessions"] + cells["context_tokens"])


def _shape(feature: BlockFeatures) -> tuple[object, ...]:
    """The features on which the cost of a block depends."""
    return (feature.kind, feature.flops_per_token, feature.flops_per_context_token, feature.weight_bytes)


def _design(cells: pd.DataFrame, by_name: Mapping[str, BlockFeatures]) -> FloatArray:
    matrix = np.zeros((len(cells), len(COLUMNS)))
    for name, positions in cells.groupby("block").indices.items():
        some = cells.iloc[positions]
        matrix[positions] = design(by_name[str(name)], some["tokens"], some["context_tokens"], some["sessions"])
    return matrix


def fit_pooled(
    cells: pd.DataFrame, kinds: Sequence[str], reference_s: Mapping[str, float], previous: PassModels
) -> dict[PassKey, PassModel]:
    """Fit the time of a pass over all nodes, in units of the node's `reference_s`, by (None, phase, kind).

    For each phase, one model covers all kinds (kind None). It is the guess for the models of the single kinds. Without
    rows, the model of `previous` is used. DataError for a phase with neither.
    """
    known = cells[cells["node"].isin(reference_s)]
    known = known.assign(seconds=known["seconds"] / known["node"].map(dict(reference_s)).astype(float))
    pooled: dict[PassKey, PassModel] = {}
    for phase in PHASES:
        rows = known[known["phase"] == phase]
        before = previous.get((None, phase, None))
        if rows.empty and before is None:
            raise DataError(f"no {phase} timing of any node that reports its reference_s, so {phase} cannot be fitted")
        pooled[None, phase, None] = shared = _fit(rows, PassModel(None, phase, None, (), (), 0, 0.0), before)
        for kind in kinds:
            guess = previous.get((None, phase, kind)) or replace(shared, cells=0)
            mine = rows[rows["kind"] == kind]
            pooled[None, phase, kind] = _fit(mine, replace(guess, kind=kind), guess)
    return pooled


def fit_nodes(
    cells: pd.DataFrame,
    kinds: Sequence[str],
    reference_s: Mapping[str, float],
    pooled: PassModels,
    previous: PassModels,
    previous_reference_s: Mapping[str, float],
    jumped: Mapping[str, float],
) -> dict[PassKey, PassModel]:
    """For each node of `reference_s`, phase and kind: a model fitted to its own rows, starting from a guess.

    The guess is the node's previous model, scaled by the node's drift since then, or else the pooled model at the
    node's speed. With fewer than `FEWEST_ROWS` rows the model is the guess itself. The drift is what the node's rows
    show, or else its reference, or else `jumped`, the factor by which the node jumped since the previous model.
    """
    fitted: dict[PassKey, PassModel] = {}
    rows_by_node = {str(node): rows for node, rows in cells.groupby("node", sort=False)}
    rows_by_key = cells.groupby(["node", "phase", "kind"], sort=False).indices
    own_by_node: dict[str | None, dict[PassKey, PassModel]] = {}
    for key, fit in previous.items():
        if fit.cells > 0:
            own_by_node.setdefault(key[0], {})[key] = fit
    for node, reference in reference_s.items():
        rows = rows_by_node.get(node, cells.iloc[:0])
        own = own_by_node.get(node, {})
        shown = reference / previous_reference_s.get(node, reference)
        if node in jumped and abs(math.log(shown)) < _TIMED_AGAIN:
            shown = jumped[node]  # a real node times its reference when it is profiled, and not since it jumped
        drift = _ratio(rows, own) or shown
        scale_s = _ratio(rows, {(node, *key[1:]): fit for key, fit in pooled.items()}) or reference
        for phase in PHASES:
            for kind in kinds:
                key = (node, phase, kind)
                guess = _scaled(own[key], drift) if key in own else _adopted(pooled[None, phase, kind], node, scale_s)
                mine = cells.iloc[rows_by_key[key]] if key in rows_by_key else cells.iloc[:0]
                weight = OWN_ROWS if key in own else GUESS_ROWS
                fitted[key] = _fit(mine, guess, guess, weight) if mine["rows"].sum() >= FEWEST_ROWS else guess
    return fitted


def predicted_s(cells: pd.DataFrame, models: PassModels) -> FloatArray:
    """Predicted seconds of each cell (C,); NaN if `models` has none for its node, phase and kind."""
    predicted = np.full(len(cells), np.nan)
    matrix = cells[list(COLUMNS)].to_numpy()
    for key, positions in cells.groupby(["node", "phase", "kind"]).indices.items():
        if model := models.get(cast(PassKey, key)):
            predicted[positions] = matrix[positions] @ np.asarray(model.coefficients)
    return predicted


def _fit(rows: pd.DataFrame, identity: PassModel, guess: PassModel | None, guess_rows: float = GUESS_ROWS) -> PassModel:
    """A model with the node, phase and kind of `identity`, fitted to `rows`; without rows, `guess` under that name."""
    if rows.empty:
        return replace(guess or identity, node=identity.node, kind=identity.kind)
    fit = huber_nonnegative(
        rows[list(COLUMNS)].to_numpy(),
        rows["seconds"].to_numpy(),
        np.sqrt(rows["rows"].to_numpy()),  # rows of one cell are correlated, so n of them do not weigh n times as much
        np.array(guess.coefficients) if guess else None,
        guess_rows,
    )
    return replace(
        identity,
        coefficients=tuple(float(value) for value in fit.coefficients),
        errors=tuple(float(value) for value in fit.errors),
        cells=len(rows),
        relative_error=fit.relative_error,
    )


def _ratio(rows: pd.DataFrame, models: PassModels) -> float | None:
    """Median ratio of measured to predicted seconds; None if too few passes can be compared."""
    if rows.empty:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # a block that takes no time
        ratios = rows["seconds"].to_numpy() / predicted_s(rows, models)
    known = np.isfinite(ratios)
    return float(np.median(ratios[known])) if rows["rows"][known].sum() >= FEWEST_ROWS else None


def _scaled(fit: PassModel, factor: float) -> PassModel:
    return replace(
        fit,
        coefficients=tuple(factor * value for value in fit.coefficients),
        errors=tuple(factor * value for value in fit.errors),
    )


def _adopted(pooled: PassModel, node: str, scale_s: float) -> PassModel:
    """The pooled model as the guess for a node that takes `scale_s` for one unit of it; no own cells were fitted."""
    return replace(_scaled(pooled, scale_s), node=node, cells=0)
