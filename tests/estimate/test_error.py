"""The estimate's error against what an emulated cluster declares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from resplit.config import load_cluster
from resplit.cost import CostModel, LinkModel, PassModel, PredictionError
from resplit.estimate import Estimates, LinkEstimate, NodeEstimate
from resplit.estimate.error import estimate_errors
from tests.estimate.test_cluster import FEATURES

HOME = load_cluster(Path("data/clusters/home.yaml"))
LAYER_S = 1.73e-3 + 0.74e-3  # of "hub"
NO_ERROR = PredictionError(None, None, 0)


def model(layer_s: float, latency_s: float, s_per_byte: float) -> CostModel:
    """A model that knows one node and one link of the home cluster."""
    layers = PassModel("hub", "decode", "layer", (layer_s, 0.0, 0.0, 0.0, 0.0), (0.0,) * 5, 1, 0.0)
    link = LinkModel("hub", "cloud", latency_s, s_per_byte, 0.0, 0.0, 9)
    return CostModel(0.0, {"hub": layer_s}, (layers,), (link,), NO_ERROR, NO_ERROR)


def test_what_a_model_and_its_corrections_say_is_compared_with_the_file() -> None:
    shape = HOME.link("hub", "cloud")
    assert shape is not None
    known = model(LAYER_S, shape.latency, 1 / shape.bandwidth)
    exact = estimate_errors(HOME, FEATURES, known, Estimates())
    assert exact.speed == pytest.approx({"hub": 0.0})
    assert exact.latency == pytest.approx({("hub", "cloud"): 0.0})
    assert exact.bandwidth == pytest.approx({("hub", "cloud"): 0.0})
    wrong = Estimates({"hub": NodeEstimate(factor=1.2)}, (LinkEstimate("hub", "cloud", 1.5, 2.0),))
    errors = estimate_errors(HOME, FEATURES, known, wrong)
    assert (errors.speed["hub"], errors.latency["hub", "cloud"], errors.bandwidth["hub", "cloud"]) == pytest.approx(
        (0.2, 0.5, -0.5)
    )
    assert "| bandwidth of links | 50.0% | 50.0% |" in str(errors)


def test_what_nobody_knows_is_left_out() -> None:
    errors = estimate_errors(HOME, FEATURES, replace(model(LAYER_S, 0.1, 1e-7), reference_s={}, links=()), Estimates())
    assert errors.speed == errors.latency == errors.bandwidth == {}
    assert "| speed of nodes | - | - |" in str(errors)
