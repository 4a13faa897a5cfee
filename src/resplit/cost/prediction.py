"""Compares the cost model with measurements: predicted and measured pass times, and its held-out errors."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from resplit.cost.model import CostModel
from resplit.cost.passes import cells_of, predicted_s
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures

__all__ = ["block_timings", "prediction_error"]


def block_timings(model: CostModel, telemetry: Telemetry, features: Sequence[BlockFeatures]) -> pd.DataFrame:
    """Predicted and measured seconds of each distinct pass in `telemetry` that the model can predict.

    Columns: `node`, `phase`, `kind`, `predicted_s`, `measured_s`. Telemetry to which the model was not fitted tests the
    model; its own telemetry shows the quality of the fit.
    """
    cells = cells_of(telemetry.blocks, features)
    predicted = predicted_s(cells, {(fit.node, fit.phase, fit.kind): fit for fit in model.passes})
    timings = cells[["node", "phase", "kind"]].assign(predicted_s=predicted, measured_s=cells["seconds"])
    return timings.dropna(ignore_index=True)


def prediction_error(model: CostModel) -> dict[str, float]:
    """The known held-out errors of the model, relative, with a name for the data that was held out."""
    held_out = {
        "longer contexts, median": model.held_out_contexts.median,
        "longer contexts, p90": model.held_out_contexts.p90,
        "nodes without block timings, median": model.held_out_nodes.median,
        "nodes without block timings, p90": model.held_out_nodes.p90,
    }
    return {name: error for name, error in held_out.items() if error is not None}
