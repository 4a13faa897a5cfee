"""The comparison of predictions with measurements."""

from __future__ import annotations

from dataclasses import replace

from resplit.cost import CostModel, PassModel, PredictionError, block_timings, prediction_error
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures


def test_each_timing_of_a_known_node_is_paired_with_its_prediction() -> None:
    layer = BlockFeatures("layer.0", "layer", 100, 200.0, 0.0, 400.0, 8.0, 16.0, False, 0.5)
    fitted = PassModel("hub", "decode", "layer", (0.002, 0.0, 0.0, 0.0, 0.0), (0.0,) * 5, 1, 0.0)
    unknown = PredictionError(None, None, 0)
    model = CostModel(0.0, {"hub": 0.002}, (fitted,), (), PredictionError(0.03, 0.07, 9), unknown)
    row = {"time_s": 0.0, "node": "hub", "block": "layer.0", "kind": "layer", "phase": "decode", "tokens": 1}
    rows = [
        row | {"context_tokens": 8, "sessions": 1, "seconds": seconds, "emulated": True}
        for seconds in (0.002, 0.003, 0.004)
    ]
    elsewhere = [rows[0] | {"node": "unknown-node"}]
    timings = block_timings(model, Telemetry.from_rows({"blocks": rows + elsewhere}), [layer])
    assert timings.to_dict("records") == [
        {"node": "hub", "phase": "decode", "kind": "layer", "predicted_s": 0.002, "measured_s": 0.003}
    ]
    assert prediction_error(model) == {"longer contexts, median": 0.03, "longer contexts, p90": 0.07}
    judged = replace(model, held_out_contexts=unknown, held_out_nodes=PredictionError(0.2, 0.4, 5))
    assert prediction_error(judged) == {
        "nodes without block timings, median": 0.2,
        "nodes without block timings, p90": 0.4,
    }
