"""The guesses from which the fits of single nodes start, and when they are kept."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from resplit.cost.features import COLUMNS
from resplit.cost.model import PHASES, PassModel, Phase
from resplit.cost.passes import FEWEST_ROWS, fit_nodes, fit_pooled

FIXED_S = (1.0, 0.0, 0.0, 0.0, 0.0)  # of a pass, whatever it computes
POOLED = {
    (None, phase, kind): PassModel(None, phase, kind, FIXED_S, FIXED_S, 9, 0.1)
    for phase in PHASES
    for kind in (None, "layer")
}


def cells(rows: int, seconds: float, phase: Phase = "decode") -> pd.DataFrame:
    """One cell of so many equal passes of node "hub"."""
    cell = {"node": "hub", "phase": phase, "kind": "layer", "rows": rows, "seconds": seconds}
    return pd.DataFrame([cell | dict(zip(COLUMNS, FIXED_S, strict=True))])


def own(fixed_s: float, fitted: int) -> dict[tuple[str | None, str, str | None], PassModel]:
    """Earlier models of the hub."""
    model = PassModel("hub", "decode", "layer", (fixed_s, 0, 0, 0, 0), FIXED_S, fitted, 0.1)
    return {("hub", phase, "layer"): replace(model, phase=phase) for phase in PHASES}


@pytest.mark.parametrize(("rows", "prefill_s"), [(FEWEST_ROWS, 6.0), (FEWEST_ROWS - 1, 3.0)])
def test_the_drift_of_a_node_scales_what_it_did_not_measure_again_if_enough_passes_show_it(
    rows: int, prefill_s: float
) -> None:
    fitted = fit_nodes(cells(rows, 6.0), ["layer"], {"hub": 1.0}, POOLED, own(3.0, fitted=4), {"hub": 1.0}, {})
    assert fitted["hub", "prefill", "layer"].coefficients[0] == pytest.approx(prefill_s)


@pytest.mark.parametrize(("fitted", "prefill_s"), [(4, 3.0), (0, 1.0)])
def test_an_earlier_model_without_passes_of_the_node_gives_way_to_the_pooled_one(fitted: int, prefill_s: float) -> None:
    found = fit_nodes(cells(0, 3.0)[:0], ["layer"], {"hub": 1.0}, POOLED, own(3.0, fitted), {"hub": 1.0}, {})
    assert found["hub", "prefill", "layer"].coefficients[0] == pytest.approx(prefill_s)


def test_without_timings_of_a_phase_its_earlier_models_are_kept() -> None:
    earlier = {key: replace(model, coefficients=(7.0, 0, 0, 0, 0)) for key, model in POOLED.items()}
    fitted = fit_pooled(cells(6, 2.0), ["layer"], {"hub": 1.0}, earlier)
    assert fitted[None, "prefill", "layer"] == earlier[None, "prefill", "layer"]
    assert fitted[None, "prefill", None] == earlier[None, "prefill", None]
    assert fitted[None, "decode", "layer"].coefficients[0] < 7.0
