"""The cost model as a value."""

from __future__ import annotations

import numpy as np
import pytest

from resplit.cost import CostModel
from resplit.cost.model import PredictionError
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
