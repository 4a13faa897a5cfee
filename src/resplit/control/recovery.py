"""Plans for the nodes that can still be used, from the latest problem that the controller was given.

The latest problem is kept in a file, so that a controller that restarts can plan at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import structlog

from resplit.files import write_atomically
from resplit.planner.partial_demand import solve_partial_demand
from resplit.problem import problem_to_json, read_problem
from resplit.types import Block, Plan, Problem

_log = structlog.get_logger(__name__)
_TIME_LIMIT_S = 0.5  # requests wait for it; the flow improves on the plan later


def load_problem(path: Path) -> Problem | None:
    """The problem that `save_problem` kept; None before the first. ProblemFormatError where it is something else."""
    return read_problem(path) if path.exists() else None


def save_problem(problem: Problem, path: Path) -> None:
    """Keep a problem, in one step: a crash leaves the one before."""
    write_atomically(path, json.dumps(problem_to_json(problem)))


def without(problem: Problem, unused: Collection[str]) -> Problem:
    """The problem in which the nodes `unused` run nothing: they stay with all their times null.

    Their links stay too: the gateway may stand beside a lost or drained node, and goes on.
    """
    gone = np.array([node.name in unused for node in problem.nodes])  # (nodes,)
    return replace(
        problem,
        prefill_s_per_token=np.where(gone, np.nan, problem.prefill_s_per_token),
        decode_s_per_token=np.where(gone, np.nan, problem.decode_s_per_token),
    )


def under_rules(problem: Problem, trusted: Collection[str], blocks: Sequence[Block]) -> Problem:
    """The problem with these nodes trusted and these blocks in the place of its own, whatever it was posed with."""
    nodes = tuple(replace(node, trusted=node.name in trusted) for node in problem.nodes)
    return replace(problem, nodes=nodes, blocks=tuple(blocks))


def plan_without(problem: Problem, unused: Collection[str], current: tuple[str, ...]) -> Plan:
    """The best plan in which the nodes `unused` run nothing, for a cluster that has `current` placed.

    Where those that are left cannot carry the whole demand, it is for the part that they can: the gateway refuses the
    rest.
    """
    plan, share = solve_partial_demand(replace(without(problem, unused), current=current), _TIME_LIMIT_S)
    if share < 1:
        _log.warning("the nodes that are left carry a part of the demand", share=share)
    return plan
