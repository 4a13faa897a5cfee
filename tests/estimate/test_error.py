"""The estimate's error against what an emulated cluster declares."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from resplit.config import load_cluster
from resplit.cost import CostModel, LinkModel, PassModel, PredictionError
from resplit.estimate import Estimates, LinkEstimate, NodeEstimate
from resplit.estimate.error import estimate_errors
from resplit.phases import NodeState, phases_of
from resplit.scenario import load_scenario
from tests.support.near_and_far import FEATURES

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
    assert "| bandwidth of links, software included | 50.0% | 50.0% |" in str(errors)


def test_what_nobody_knows_is_left_out() -> None:
    errors = estimate_errors(HOME, FEATURES, replace(model(LAYER_S, 0.1, 1e-7), reference_s={}, links=()), Estimates())
    assert errors.speed == errors.latency == errors.bandwidth == {}
    assert errors.rows() == []
    assert errors.medians() == {}


def test_the_time_of_the_software_is_what_messages_of_all_links_take_longer_than_declared() -> None:
    shapes = {pair: HOME.link(*pair) for pair in itertools.permutations(HOME.node_names, 2)}
    links = tuple(
        LinkModel(*pair, shape.latency + 0.003, 1 / shape.bandwidth + 1e-8, 0.0, 0.0, 9)
        for pair, shape in shapes.items()
        if shape
    )
    errors = estimate_errors(HOME, FEATURES, replace(model(LAYER_S, 0.1, 1e-7), links=links), Estimates())
    assert (errors.software_s, errors.software_s_per_byte) == pytest.approx((0.003, 1e-8))
    assert max(map(abs, errors.latency_less_software.values())) < 1e-6
    assert max(map(abs, errors.bandwidth_less_software.values())) < 1e-6
    medians = errors.medians()
    assert medians["estimate_error_latency"] == pytest.approx(0.75)  # 3 ms on links that have 4 ms in the median
    assert medians["estimate_error_latency_less_software"] == pytest.approx(0.0, abs=1e-6)
    assert (
        "latency of links, less 3.0 ms of software",
        pytest.approx(0.0, abs=1e-6),
        pytest.approx(0.0, abs=1e-6),
    ) in (errors.rows())


def test_the_estimate_is_compared_with_what_a_scenario_has_changed() -> None:
    shape = HOME.link("hub", "cloud")
    assert shape is not None
    scenario = load_scenario(Path("data/scenarios/home-day.yaml"))
    phase = phases_of(HOME, scenario)[-1]
    assert phase.links["cloud", "hub"].latency_s == 0.12
    slower = replace(phase, nodes=dict(phase.nodes) | {"hub": NodeState(slowdown=2.0)})
    followed = Estimates(
        {"hub": NodeEstimate(factor=2.0)},
        (
            LinkEstimate(
                "hub",
                "cloud",
                0.12 / shape.latency,
                shape.bandwidth / phase.links["cloud", "hub"].bandwidth_bytes_per_s,
            ),
        ),
    )
    known = model(LAYER_S, shape.latency, 1 / shape.bandwidth)
    errors = estimate_errors(HOME, FEATURES, known, followed, slower)
    assert (errors.speed["hub"], errors.latency["hub", "cloud"], errors.bandwidth["hub", "cloud"]) == pytest.approx(
        (0.0, 0.0, 0.0), abs=1e-9
    )
    lost = replace(phase, nodes=dict(phase.nodes) | {"hub": NodeState(up=False)})
    assert estimate_errors(HOME, FEATURES, known, followed, lost).speed == {}
