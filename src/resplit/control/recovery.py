"""Plans without the nodes that are lost, from the newest picture of the cluster that the controller was given.

The picture, a placement problem, is kept in a file: a controller that was restarted must not be blind.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from resplit.planner import solve
from resplit.problem import problem_to_json, read_problem
from resplit.types import Plan, Problem

_TIME_LIMIT_S = 2.0


def load_picture(path: Path) -> Problem | None:
    """The problem that `save_picture` kept; None before the first. ProblemFormatError where it is something else."""
    return read_problem(path) if path.exists() else None


def save_picture(problem: Problem, path: Path) -> None:
    """Keep a problem, in one step: a crash leaves the one before."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(problem_to_json(problem)), encoding="utf-8")
    partial.replace(path)


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
