"""The cost model: predicted seconds of each block on each node and of each message on each link, from telemetry."""

from resplit.cost.fit import SpeedJump, fit_cost_model
from resplit.cost.links import LinkModel
from resplit.cost.model import CostModel, PassModel, PredictionError
from resplit.cost.prediction import block_timings, prediction_error
from resplit.cost.problem import NodeReading, node_readings, problem_from

__all__ = [
    "CostModel",
    "LinkModel",
    "NodeReading",
    "PassModel",
    "PredictionError",
    "SpeedJump",
    "block_timings",
    "fit_cost_model",
    "node_readings",
    "prediction_error",
    "problem_from",
]
