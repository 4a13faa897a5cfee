"""The fit of pass times: per node, phase and kind of block, each leaning on what is known without its own rows.

Knows timed passes as a table; knows no links, no clock and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pandas as pd

from resplit.cost.features import COLUMNS, design
from resplit.cost.model import PHASES, PassModel, Phase
from resplit.cost.robust import huber_nonnegative
from resplit.errors import DataError
from resplit.types import BlockFeatures, FloatArray

__all__ = ["PassModels", "cells_of", "fit_nodes", "fit_pooled", "predicted_s"]

FEWEST_ROWS = 5  # with fewer, one pass that hung would decide: the node's guess stands as it is
CONTEXT_STEP = 16  # tokens: passes whose contexts lie in one step share a cell

PassModels = Mapping[tuple[str | None, Phase, str | None], PassModel]


def cells_of(blocks: pd.DataFrame, features: Sequence[BlockFeatures]) -> pd.DataFrame:
    """The distinct passes in `blocks` (columns `telemetry.BLOCK_COLUMNS`), one row each: node, phase, kind, `length`
    (tokens in the cache after it), the median `seconds`, how many `rows` it stands for, and the columns of `design`.

    Equal blocks share a cell: thirty equal layers are one observation repeated. DataError for an unknown block.
    """
    by_name = {feature.name: feature for feature in features}
    if unknown := sorted(set(blocks["block"]) - set(by_name)):
        raise DataError(f"timings of block {unknown[0]!r}, which this model does not have")
    shapes: dict[tuple[object, ...], int] = {}
    shape_of = {name: shapes.setdefault(_shape(feature), len(shapes)) for name, feature in by_name.items()}
    keyed = blocks.assign(shape=blocks["block"].map(shape_of), step=blocks["context_tokens"] // CONTEXT_STEP)
    groups = keyed.groupby(["node", "phase", "kind", "shape", "tokens", "step"], sort=True)
    cells = groups.agg(
        seconds=("seconds", "median"),
        context_tokens=("context_tokens", "mean"),
        rows=("seconds", "size"),
        block=("block", "first"),
    ).reset_index()
    cells[list(COLUMNS)] = _design(cells, by_name)
    return cells.assign(length=cells["tokens"] + cells["context_tokens"])


def _shape(feature: BlockFeatures) -> tuple[object, ...]:
    """What makes two blocks cost the same."""
    return (feature.kind, feature.flops_per_token, feature.flops_per_context_token, feature.weight_bytes)


def _design(cells: pd.DataFrame, by_name: Mapping[str, BlockFeatures]) -> FloatArray:
    matrix = np.zeros((len(cells), len(COLUMNS)))
    for name, positions in cells.groupby("block").indices.items():
        some = cells.iloc[positions]
        matrix[positions] = design(by_name[str(name)], some["tokens"], some["context_tokens"])
    return matrix


def fit_pooled(
    cells: pd.DataFrame, kinds: Sequence[str], reference_s: Mapping[str, float], previous: PassModels
) -> dict[tuple[str | None, Phase, str | None], PassModel]:
    """Per phase, what a pass takes in units of the node's `reference_s`: over all kinds (kind None), then per kind,
    leaning on the former. Where there are no rows, what `previous` had. DataError for a phase with neither."""
    known = cells[cells["node"].isin(reference_s)]
    known = known.assign(seconds=known["seconds"] / known["node"].map(dict(reference_s)).astype(float))
    pooled: dict[tuple[str | None, Phase, str | None], PassModel] = {}
    for phase in PHASES:
        rows = known[known["phase"] == phase]
        before = previous.get((None, phase, None))
        if rows.empty and before is None:
            raise DataError(f"no {phase} timing of any node that reports its reference_s: nothing to fit {phase} from")
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
) -> dict[tuple[str | None, Phase, str | None], PassModel]:
    """Per node of `reference_s`, phase and kind: fitted to its own rows, leaning on a guess from elsewhere.

    The guess is the node's own earlier model, slowed down as the node has been since; without one the pooled model at
    the node's speed. A kind with fewer than `FEWEST_ROWS` rows is the guess itself.
    """
    fitted: dict[tuple[str | None, Phase, str | None], PassModel] = {}
    for node, reference in reference_s.items():
        rows = cells[cells["node"] == node]
        own = {key: fit for key, fit in previous.items() if key[0] == node and fit.cells > 0}
        drift = _ratio(rows, own) or reference / previous_reference_s.get(node, reference)
        speed = _ratio(rows, {(node, *key[1:]): fit for key, fit in pooled.items()}) or reference
        for phase in PHASES:
            for kind in kinds:
                key = (node, phase, kind)
                guess = _scaled(own[key], drift) if key in own else _adopted(pooled[None, phase, kind], node, speed)
                mine = rows[(rows["phase"] == phase) & (rows["kind"] == kind)]
                fitted[key] = _fit(mine, guess, guess) if mine["rows"].sum() >= FEWEST_ROWS else guess
    return fitted


def predicted_s(cells: pd.DataFrame, models: PassModels) -> FloatArray:
    """Predicted seconds of each cell (C,), NaN where `models` has none for its node, phase and kind."""
    predicted = np.full(len(cells), np.nan)
    matrix = cells[list(COLUMNS)].to_numpy()
    for key, positions in cells.groupby(["node", "phase", "kind"]).indices.items():
        if model := models.get(cast(tuple[str, Phase, str], key)):
            predicted[positions] = matrix[positions] @ np.asarray(model.coefficients)
    return predicted


def _fit(rows: pd.DataFrame, identity: PassModel, guess: PassModel | None) -> PassModel:
    """The model called as `identity`, fitted to `rows`; `guess` itself, so called, where there are none."""
    if rows.empty:
        return replace(guess or identity, node=identity.node, kind=identity.kind)
    fit = huber_nonnegative(
        rows[list(COLUMNS)].to_numpy(),
        rows["seconds"].to_numpy(),
        np.sqrt(rows["rows"].to_numpy()),  # rows of one cell share their disturbances: n of them are not n times one
        np.array(guess.coefficients) if guess else None,
    )
    return replace(
        identity,
        coefficients=tuple(float(value) for value in fit.coefficients),
        errors=tuple(float(value) for value in fit.errors),
        cells=len(rows),
        relative_error=fit.relative_error,
    )


def _ratio(rows: pd.DataFrame, models: PassModels) -> float | None:
    """By how much the measured passes exceed what `models` say of them (median); None where too few can be compared."""
    ratios = rows["seconds"].to_numpy() / predicted_s(rows, models)
    known = np.isfinite(ratios)
    return float(np.median(ratios[known])) if rows["rows"][known].sum() >= FEWEST_ROWS else None


def _scaled(fit: PassModel, factor: float) -> PassModel:
    return replace(
        fit,
        coefficients=tuple(factor * value for value in fit.coefficients),
        errors=tuple(factor * value for value in fit.errors),
    )


def _adopted(pooled: PassModel, node: str, speed: float) -> PassModel:
    """The pooled model as the guess for a node of this speed; no cell of its own stands behind it."""
    return replace(_scaled(pooled, speed), node=node, cells=0)
