"""The cost model as a value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.cost import CostModel, LinkModel, PassModel
from resplit.cost.model import Phase, PredictionError
from resplit.errors import DataError
from resplit.types import BlockFeatures


def test_a_model_survives_json_unchanged(model: CostModel) -> None:
    assert CostModel.from_json(model.to_json()) == model


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"passes": [{}]}', "null"])
def test_text_that_is_not_a_model_is_a_data_error(text: str) -> None:
    with pytest.raises(DataError, match="not a cost model"):
        CostModel.from_json(text)


def test_times_of_an_unknown_node_are_nan_and_an_unknown_kind_is_an_error(
    model: CostModel, features: tuple[BlockFeatures, ...]
) -> None:
    assert np.isnan(model.pass_s(features[0], "stranger", "decode", [1, 1], [5, 6])).tolist() == [True, True]
    attention = BlockFeatures("layer.0.attention", "attention", 1, 1.0, 1.0, 1.0, 1.0, 1.0, False, 0.0)
    with pytest.raises(DataError, match="attention"):
        model.pass_s(attention, "home-a", "decode", 1, 5)


def test_prediction_error_is_relative_and_absent_without_cells() -> None:
    error = PredictionError.of(np.array([1.1, 0.8, 1.0]), np.ones(3))
    assert error.median == pytest.approx(0.1)
    assert error.p90 == pytest.approx(0.18)
    assert PredictionError.of(np.array([]), np.array([])) == PredictionError(None, None, 0)


def _pass(node: str | None, phase: Phase, kind: str | None, seconds: float, cells: int, error: float) -> PassModel:
    return PassModel(node, phase, kind, (seconds, 2.0, 0.0, 0.0, 0.0), (0.0,) * 5, cells, error)


NOT_JUDGED = PredictionError(None, None, 0)
PASSES = (
    _pass(None, "decode", None, 9.0, 50, 0.9),
    _pass("hub", "decode", None, 8.0, 0, 0.8),
    _pass("hub", "decode", "layer", 1.0, 1, 0.1),
    _pass("hub", "prefill", "layer", 3.0, 5, 0.3),
    _pass("edge", "decode", "layer", 4.0, 5, 0.6),
)
LINKS = (LinkModel("hub", "edge", 0.1, 0.0, 0.0, 0.0, 1), LinkModel("edge", "hub", 0.2, 0.0, 0.0, 0.0, 1))
SMALL = CostModel(5.0, {"hub": 1.0, "edge": 2.0}, PASSES, LINKS, NOT_JUDGED, NOT_JUDGED)
LAYER = BlockFeatures("layer.0", "layer", 1, 0.0, 0.0, 0.0, 0.0, 0.0, False, 0.0)


def test_a_pass_is_predicted_by_the_model_of_its_node_phase_and_kind() -> None:
    assert SMALL.pass_s(LAYER, "hub", "decode", 1, 7).tolist() == [3.0]
    assert SMALL.pass_s(LAYER, "hub", "prefill", [1, 5], 0).tolist() == [5.0, 13.0]
    assert SMALL.pass_s(LAYER, "edge", "decode", [1, 1], [7, 8]).tolist() == [6.0, 6.0]
    assert SMALL.find("hub", "decode", "layer") is PASSES[2]
    assert SMALL.find("hub", "decode", "head") is None


def test_the_times_on_an_unknown_node_have_the_shape_of_the_passes() -> None:
    for tokens, context_tokens in ((1, [5, 6]), ([1, 1], 5), ([1, 1], [5, 6])):
        assert SMALL.pass_s(LAYER, "stranger", "decode", tokens, context_tokens).shape == (2,)
    assert SMALL.pass_s(LAYER, "stranger", "decode", 1, 5).shape == (1,)


def test_a_link_is_found_by_its_direction() -> None:
    assert SMALL.link("hub", "edge") is LINKS[0]
    assert SMALL.link("edge", "hub") is LINKS[1]
    assert SMALL.link("hub", "hub") is None


def test_the_uncertainty_is_the_held_out_median_or_that_of_the_fits_to_own_passes() -> None:
    assert SMALL.uncertainty == 0.3
    assert replace(SMALL, held_out_contexts=PredictionError(0.07, 0.2, 9)).uncertainty == 0.07
    assert replace(SMALL, passes=PASSES[:2]).uncertainty == 0.0


def test_prediction_error_is_relative_to_the_measured_time() -> None:
    error = PredictionError.of(np.array([3.0, 8.0]), np.array([2.0, 4.0]))
    assert (error.median, error.p90, error.cells) == (pytest.approx(0.75), pytest.approx(0.95), 2)
