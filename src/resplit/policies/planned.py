"""Policies that take the plan of a published planner at each tick: no price of a move, no hysteresis but a cooldown.

`memory` is the rule of exo: blocks in proportion to memory. `latency-dp` is EdgeShard's dynamic programme, run again.
`swarm` is the rule of Petals: a server moves where the swarm is weakest. `greedy` takes the cheapest node block by
block. `static-uniform` cuts the model into equal parts once, and keeps them.

Some of these rules do not know that private blocks need trusted nodes. Where the plan for all nodes is none that may
be deployed, the rule is applied to the trusted nodes alone, as a careful operator would.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from resplit.decide import Decision, Settings
from resplit.planner import solve
from resplit.planner.shortlist import restricted
from resplit.policies.base import Occasion, Situation, keep, move
from resplit.types import Plan, Problem

__all__ = ["Greedy", "LatencyDp", "MemoryShares", "StaticUniform", "Swarm"]


class _Planned:
    """Takes the plan of `solver` if it differs from today's placement, at most once in each cooldown."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick"})
    solver: ClassVar[str]

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """The plan of the planner; keep if it has none, or during the cooldown after the last move."""
        last, settings = situation.history.last, situation.settings
        if last is not None and situation.now_s < last.at_s + settings.cooldown_s:
            return keep(situation, f"the last move was {situation.now_s - last.at_s:.0f} s ago")
        plan = self._plan(situation.problem, settings)
        if plan.placement is None and (trusted := _among_trusted(situation.problem)):
            plan = self._plan(trusted, settings)
        return move(situation, plan.placement, plan.reason or f"the plan of {self.solver}")

    def _plan(self, problem: Problem, settings: Settings) -> Plan:
        return solve(problem, solver=self.solver, time_limit_s=settings.time_limit_s, work_limit=settings.work_limit)


class MemoryShares(_Planned):
    """Blocks in proportion to the memory of nodes, as in exo."""

    solver = "memory"


class LatencyDp(_Planned):
    """The dynamic programme of EdgeShard for the least latency, at every tick."""

    solver = "latency-dp"


class Swarm(_Planned):
    """The rule of Petals for a swarm of servers, at every tick."""

    solver = "swarm"


class Greedy(_Planned):
    """The heuristic: block after block on the node that adds the least to the objective."""

    solver = "greedy"


class StaticUniform(_Planned):
    """Equal parts on all nodes at the first tick, and then for good."""

    solver = "uniform"

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """Equal parts the first time; keep from then on."""
        if situation.history.last is not None:
            return keep(situation, "the first placement is kept")
        return super().decide(situation, rng)


def _among_trusted(problem: Problem) -> Problem | None:
    """The problem with its trusted nodes only; None if these are all nodes, or if a source is not among them."""
    trusted = [index for index, node in enumerate(problem.nodes) if node.trusted]
    names = {problem.nodes[index].name for index in trusted}
    if len(trusted) == len(problem.nodes) or not {each.source for each in problem.classes} <= names:
        return None
    return restricted(replace(problem, current=None), trusted)
