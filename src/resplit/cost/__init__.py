"""The cost model: what each block takes on each node and each message on each link, fitted to telemetry.

Knows no node process, no planner and no file.
"""

from resplit.cost.fit import fit_cost_model
from resplit.cost.links import LinkModel
from resplit.cost.model import CostModel, PassModel, PredictionError
from resplit.cost.problem import NodeState, node_states, problem_from

__all__ = [
    "CostModel",
    "LinkModel",
    "NodeState",
    "PassModel",
    "PredictionError",
    "fit_cost_model",
    "node_states",
    "problem_from",
]
