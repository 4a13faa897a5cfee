"""Write a solver, register it, and compare it with the default solver: `python examples/own_solver.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from resplit.planner import SOLVERS
from resplit.planner import solve as solve_with
from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome
from resplit.problem import read_problem

PROBLEM = Path(__file__).parents[1] / "tests" / "data" / "problems" / "n004-smollm2-135m-c1-11.json"


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Random search: cut the chain into three segments, put each on a random node, keep the best legal placement."""
    rng, atoms, nodes = np.random.default_rng(0), *instance.shape
    best, best_objective = None, np.inf
    for _ in range(2000):
        cuts = np.sort(rng.integers(1, atoms, size=2))
        nodes_of = np.repeat(rng.integers(0, nodes, size=3), np.diff([0, *cuts, atoms]))  # (atoms,)
        found = evaluate(instance.problem, instance.placement(nodes_of))
        if not found.violations and found.objective < best_objective:
            best, best_objective = nodes_of, found.objective
    return Outcome(best, lower_bound=-np.inf, reason=None if best is not None else "random search found no placement")


def main() -> None:
    SOLVERS["random"] = __name__  # a solver is a module with a function `solve`
    problem = read_problem(PROBLEM)
    for name in ("random", "relax"):
        plan = solve_with(problem, solver=name, time_limit_s=2.0)
        print(f"{name:8} objective {plan.objective or np.inf:.4g} in {plan.solve_s:.2f} s")


if __name__ == "__main__":
    main()
