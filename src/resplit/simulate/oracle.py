"""The policy `oracle`: a limit that no policy should reach, because its moves cost nothing.

It knows the scenario. At every change it plans for the true state from then on, and moves at once and at no cost.
Of its own plan and the placements of all other policies it keeps what the simulator judges best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from resplit.decide.state import Placement
from resplit.errors import InfeasibleError, ProposalRefusedError
from resplit.metrics import summarise
from resplit.phases import Phase, declared_phase, phases_of, problem_in
from resplit.planner.best_effort import solve_best_effort
from resplit.policies import make_policy
from resplit.records import RunRecord
from resplit.simulate.run import declared_problem, simulate
from resplit.simulate.world import World

__all__ = ["ORACLE", "oracle"]

ORACLE = "oracle"
_AFTER_S = 1e-6  # a placement changes right after the scenario does, when a node that comes back is there
Script = tuple[tuple[float, Placement], ...]


def oracle(world: World, seed: int, rivals: Sequence[RunRecord]) -> RunRecord:
    """The best run that was found, called `oracle`, of the workload of `seed`, which the `rivals` served too.

    Whole runs come first: the plans of all phases, and each rival's placements at its times. Then, phase by phase, any
    of their placements replaces that of the best run if more requests are served, or as many with less mean latency.
    InfeasibleError if some phase has no plan and no rival served.
    """
    phases, arrivals, loop = phases_of(world.cluster, world.scenario), world.arrivals(seed), world.loop()
    runs: dict[Script, RunRecord | None] = {}

    def badness(script: Script) -> tuple[float, float]:
        if script not in runs:
            try:
                runs[script] = simulate(
                    world.cluster, world.features, world.scenario, arrivals, make_policy("static"),
                    name=ORACLE, seed=seed, loop=loop, script=script, free_moves=True,
                )  # fmt: skip
            except ProposalRefusedError:  # a node of a placement is down in that phase
                runs[script] = None
        run = runs[script]
        return (math.inf, math.inf) if run is None else _badness(run)

    planned = _planned(world, phases, loop.settings.work_limit)
    scripts = [planned, *(_played(rival) for rival in rivals)]
    best = min(dict.fromkeys(scripts), key=badness)
    ends_s = [*(phase.at_s for phase in phases[1:]), math.inf]
    for phase, until_s in zip(phases, ends_s, strict=True):
        placements = dict.fromkeys(each for script in scripts for each in _live(script, phase.at_s, until_s))
        best = min([best, *(_replaced(best, phase.at_s, until_s, each) for each in placements)], key=badness)
    found = runs[best]
    if found is None:
        raise InfeasibleError(f"{world.scenario.name}: every plan uses a node that is down")
    return found


def _badness(record: RunRecord) -> tuple[float, float]:
    """How badly a run served: the requests that failed, then the mean latency of the others (s)."""
    metrics = summarise(record)
    return metrics.offered - metrics.completed, metrics.latency_mean_s


def _planned(world: World, phases: Sequence[Phase], work_limit: int | None) -> Script:
    """The best plan for what is true in each phase. A phase without a plan keeps the one before."""
    declared = declared_phase(world.cluster, world.scenario)
    problem = declared_problem(world.cluster, world.features, world.scenario)
    script: list[tuple[float, Placement]] = []
    for phase in phases:
        placement = solve_best_effort(problem_in(problem, phase, declared), work_limit=work_limit).plan.placement
        if placement is not None and (not script or placement != script[-1][1]):
            script.append((_begin_s(phase.at_s) if script else 0.0, placement))
    if not script:
        raise InfeasibleError(f"{world.scenario.name}: no phase has a placement")
    return tuple(script)


def _played(run: RunRecord) -> Script:
    """The placements that a run had live, with the times from which on."""
    epochs = zip(run.epochs.time_s, run.epochs.placement, strict=True)
    return tuple((float(time_s), tuple(str(placement).split(","))) for time_s, placement in epochs)


def _live(script: Script, from_s: float, until_s: float) -> list[Placement]:
    """The placements that are live at some time in `from_s..until_s`."""
    ends_s = [*(at_s for at_s, _ in script[1:]), math.inf]
    return [
        placement for (at_s, placement), end_s in zip(script, ends_s, strict=True) if at_s < until_s and end_s > from_s
    ]


def _replaced(script: Script, from_s: float, until_s: float, placement: Placement) -> Script:
    """The same, with `placement` in `from_s..until_s`."""
    before = [each for each in script if each[0] < from_s]
    after = [each for each in script if each[0] >= until_s]
    middle = [(_begin_s(from_s) if before else 0.0, placement)]
    if until_s < math.inf and (not after or after[0][0] > _begin_s(until_s)):
        middle.append((_begin_s(until_s), _live(script, from_s, _begin_s(until_s))[-1]))
    return (*before, *middle, *after)


def _begin_s(phase_s: float) -> float:
    return phase_s + _AFTER_S
