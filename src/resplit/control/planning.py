"""Plans that the controller makes itself, for the nodes that answer and are not drained.

It plans from the latest problem that a flow sent. The problem is saved in a file, so that a restarted controller can
plan at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import structlog

from resplit.control.cluster_view import ClusterView
from resplit.epochs import RECOVER, Proposal
from resplit.errors import CapacityError, DataError, InfeasibleError
from resplit.files import write_atomically
from resplit.planner.best_effort import BestEffortPlan, solve_best_effort
from resplit.planner.evaluate import evaluate
from resplit.problem import problem_to_json, read_problem
from resplit.types import Block, Problem

_log = structlog.get_logger(__name__)
DEMAND_WINDOW_S = 8.0  # the demand of a plan that is made at once is that of the last seconds
_TIME_LIMIT_S = 0.15  # requests wait for the plan; more time proves that it is good, and rarely finds a better one


def load_problem(path: Path) -> Problem | None:
    """The problem that `save_problem` wrote; None if there is no file. ProblemFormatError if the file is damaged."""
    return read_problem(path) if path.exists() else None


def save_problem(problem: Problem, path: Path) -> None:
    """Save a problem; a crash leaves the previous one. CapacityError if the file cannot be written."""
    try:
        write_atomically(path, json.dumps(problem_to_json(problem)), 0o600)
    except OSError as error:
        raise CapacityError(f"{path}: cannot be written ({error.strerror})") from error


def without(problem: Problem, unused: Collection[str]) -> Problem:
    """The problem in which the nodes `unused` run no block: they stay, with all their times null.

    Their links stay too, because the gateway may be on a lost or drained node.
    """
    gone = np.array([node.name in unused for node in problem.nodes])  # (nodes,)
    return replace(
        problem,
        prefill_s_per_token=np.where(gone, np.nan, problem.prefill_s_per_token),
        decode_s_per_token=np.where(gone, np.nan, problem.decode_s_per_token),
    )


def under_rules(problem: Problem, trusted: Collection[str], blocks: Sequence[Block]) -> Problem:
    """The problem under the current rules: these nodes are trusted, and these blocks replace the problem's own."""
    nodes = tuple(replace(node, trusted=node.name in trusted) for node in problem.nodes)
    return replace(problem, nodes=nodes, blocks=tuple(blocks))


def plan_without(
    problem: Problem, unused: Collection[str], current: tuple[str, ...], work_limit: int | None = None
) -> BestEffortPlan:
    """The best plan in which the nodes `unused` run no block, for a cluster where `current` is placed now.

    If the other nodes cannot serve the whole demand within their ceilings, the ceilings rise, and then the plan is for
    the part that they can serve. The gateway refuses the rest.
    """
    return solve_best_effort(replace(without(problem, unused), current=current), _TIME_LIMIT_S, work_limit)


def planned_for(
    problem: Problem, placement: tuple[str, ...] | None, unused: Collection[str], based_on: int
) -> Proposal | None:
    """The proposal of a placement that was planned before a loss; None if it is not legal now, or uses a lost node."""
    if placement is None or set(placement) & set(unused):
        return None
    evaluation = evaluate(problem, placement)
    return None if evaluation.violations else Proposal(placement, RECOVER, based_on, evaluation.terms.latency_s)


def context_warning(problem: Problem, context_tokens: int, deadline_s: float) -> str | None:
    """A warning if no placement can generate a whole context within the deadline of a request; else None.

    The estimate is a lower bound: each block on its fastest node, and no time for links.
    """
    decode_s = np.where(np.isnan(problem.decode_s_per_token), np.inf, problem.decode_s_per_token)  # (blocks, nodes)
    least_s = context_tokens * float(decode_s.min(axis=1).sum())
    if least_s <= deadline_s:
        return None
    return (
        f"limits: {context_tokens} tokens take at least {least_s:.0f} s on the fastest nodes, but requests end after "
        f"{deadline_s:g} s; lower context_tokens or raise deadline"
    )


class ControllerPlanner:
    """Plans for one cluster, from the latest problem."""

    def __init__(self, view: ClusterView, problem_file: Path) -> None:
        self._view = view
        self._file = problem_file
        self._latest_problem = load_problem(problem_file)
        if self._latest_problem is not None:
            self._check_limits(self._latest_problem)
        # The placement that was planned for the loss of these nodes in an epoch; None if there is none.
        self.after_loss: Callable[[int, Sequence[str]], tuple[str, ...] | None] = lambda epoch, lost: None

    def set_problem(self, problem: Problem) -> None:
        """Use a problem as the latest one, and save it for the next start."""
        if self._latest_problem is None:
            self._check_limits(problem)
        self._latest_problem = problem
        save_problem(problem, self._file)

    def _check_limits(self, problem: Problem) -> None:
        limits = self._view.cluster.limits
        if warning := context_warning(problem, limits.context_tokens, limits.deadline):
            _log.warning(warning)

    def present_problem(self, current: tuple[str, ...], window_s: float) -> Problem:
        """The latest problem under the current rules and the demand of the last `window_s` seconds.

        Nodes that are lost, drained, or were faulty run no block. DataError if there is no problem for this model yet.
        """
        problem, unused = self._latest(self._view.gateway.suspects())
        return replace(without(problem, unused), current=current, classes=tuple(self._view.gateway.demand(window_s)))

    async def plan(
        self, current: tuple[str, ...], based_on: int, action: str = RECOVER, avoid: frozenset[str] = frozenset()
    ) -> Proposal:
        """A proposal for the nodes that answer and are not drained, where `current` is placed now.

        Nodes to `avoid`, and nodes that were faulty, are used only if there is no placement without them. DataError if
        there is no problem for this model yet, InfeasibleError if no placement keeps the rules.
        """
        avoid |= self._view.gateway.suspects()
        try:
            return await self._plan(current, based_on, action, avoid)
        except InfeasibleError:
            if not avoid:
                raise
            return await self._plan(current, based_on, action, frozenset())

    async def _plan(self, current: tuple[str, ...], based_on: int, action: str, avoid: frozenset[str]) -> Proposal:
        problem, unused = self._latest(avoid)
        if planned := self._planned(problem, unused, based_on):
            return replace(planned, action=action)
        found = await asyncio.to_thread(plan_without, problem, unused, current)
        plan = found.plan
        if plan.placement is None or plan.terms is None:
            prefix = f"without {', '.join(sorted(unused))} " if unused else ""
            raise InfeasibleError(f"{prefix}there is no placement: {plan.reason}")
        return Proposal(plan.placement, action, based_on, plan.terms.latency_s, plan.lower_bound, found.note)

    def _planned(self, problem: Problem, unused: frozenset[str], based_on: int) -> Proposal | None:
        """The placement that was planned for the loss of these nodes, if it is legal now."""
        return planned_for(problem, self.after_loss(based_on, self._view.unreachable), unused, based_on)

    def _latest(self, avoid: frozenset[str]) -> tuple[Problem, frozenset[str]]:
        """The latest problem under the current rules, and the nodes that must run no block."""
        view, unreachable, problem = self._view, self._view.unreachable, self._latest_problem
        if problem is None or len(problem.blocks) != len(view.rules.features):
            lost = f"{', '.join(unreachable)} lost, and " if unreachable else ""
            raise DataError(f"{lost}there is no problem to plan with yet")
        blocks = [feature.block() for feature in view.rules.features]
        problem = under_rules(problem, view.cluster.trusted, blocks)
        removed = {node.name for node in problem.nodes} - set(view.cluster.node_names)
        return problem, frozenset(removed | set(unreachable) | view.rules.drained | avoid)
