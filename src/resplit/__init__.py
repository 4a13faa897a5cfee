"""resplit: adaptive split inference of large foundation models over unequal edge machines.

The public names are imported when they are first used, so that `import resplit` takes no time. The function `decide` is
in `resplit.decide`: a package and a function of one name cannot both be here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resplit.cluster.client import ControlClient
    from resplit.config import ClusterConfig, load_cluster
    from resplit.cost import CostModel, fit_cost_model, problem_from
    from resplit.decide import Decision
    from resplit.epochs import LiveEpoch, Proposal
    from resplit.errors import ResplitError
    from resplit.metrics import summarise
    from resplit.planner import SOLVERS, solve
    from resplit.problem import plan_to_json, problem_from_json, problem_to_json, read_problem
    from resplit.records import RunRecord
    from resplit.telemetry.tables import Telemetry
    from resplit.types import Plan, Problem

__all__ = [
    "SOLVERS",
    "ClusterConfig",
    "ControlClient",
    "CostModel",
    "Decision",
    "LiveEpoch",
    "Plan",
    "Problem",
    "Proposal",
    "ResplitError",
    "RunRecord",
    "Telemetry",
    "fit_cost_model",
    "load_cluster",
    "plan_to_json",
    "problem_from",
    "problem_from_json",
    "problem_to_json",
    "read_problem",
    "solve",
    "summarise",
]

_MODULES = {
    "resplit.cluster.client": ("ControlClient",),
    "resplit.config": ("ClusterConfig", "load_cluster"),
    "resplit.cost": ("CostModel", "fit_cost_model", "problem_from"),
    "resplit.decide": ("Decision",),
    "resplit.epochs": ("LiveEpoch", "Proposal"),
    "resplit.errors": ("ResplitError",),
    "resplit.metrics": ("summarise",),
    "resplit.planner": ("SOLVERS", "solve"),
    "resplit.problem": ("plan_to_json", "problem_from_json", "problem_to_json", "read_problem"),
    "resplit.records": ("RunRecord",),
    "resplit.telemetry.tables": ("Telemetry",),
    "resplit.types": ("Plan", "Problem"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'resplit' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
