"""Plan where the blocks of a model run: `python examples/plan_placement.py [PROBLEM.json]`."""

from __future__ import annotations

import sys
from pathlib import Path

from resplit.planner import solve
from resplit.problem import read_problem

PROBLEM = Path(__file__).parents[1] / "tests" / "data" / "problems" / "n006-llama3.2-1b-c2-12.json"


def main() -> None:
    problem = read_problem(Path(sys.argv[1]) if len(sys.argv) > 1 else PROBLEM)
    plan = solve(problem, time_limit_s=2.0)
    if plan.placement is None:
        sys.exit(f"no placement: {plan.reason}")
    print(f"objective {plan.objective:.4g}, proven to be at least {plan.lower_bound:.4g}")
    for segment in plan.segments:
        first, last = problem.blocks[segment.first].name, problem.blocks[segment.last].name
        print(f"{segment.node:12} {first} .. {last}")
    for name, latency_s in plan.class_latency_s.items():
        print(f"class {name}: {latency_s:.3f} s per request")


if __name__ == "__main__":
    main()
