"""Plans without the nodes that are lost, from the newest picture of the cluster that the controller was given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from resplit.planner import solve
from resplit.types import Plan, Problem

_TIME_LIMIT_S = 2.0


def plan_without(problem: Problem, lost: Collection[str], current: tuple[str, ...]) -> Plan:
    """The best plan in which the nodes `lost` run nothing; they stay in the problem with all their times null.

    Their links stay too: the gateway may stand beside a lost node, and goes on.
    """
    gone = np.array([node.name in lost for node in problem.nodes])  # (nodes,)
    survivors = replace(
        problem,
        prefill_s_per_token=np.where(gone, np.nan, problem.prefill_s_per_token),
        decode_s_per_token=np.where(gone, np.nan, problem.decode_s_per_token),
        current=current,
    )
    return solve(survivors, time_limit_s=_TIME_LIMIT_S)
