"""The command `resplit plan`: reads problem files and prints one answer for each.

Numpy and the solvers are imported only when the command runs, so that the command line starts quickly.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resplit.errors import ProblemFormatError
from resplit.planner import load, solve

if TYPE_CHECKING:
    from resplit.types import Problem

__all__ = ["plan_command"]

SLOW_LOAD_S = 3.0

EXIT_PLANNED, EXIT_FORMAT, EXIT_INFEASIBLE, EXIT_UNKNOWN = 0, 2, 3, 4


def plan_command(
    files: Sequence[Path], solver: str = "relax", time_limit_s: float = 10.0, work_limit: int | None = None,
    tolerance: float = 0.0, explain: bool = False,
) -> int:  # fmt: skip
    """Print one answer per file and return the exit status defined in docs/problem.md.

    An answer is a JSON object on one line or, with `explain`, a page of text. Raises ConfigError for an unknown solver.
    """
    _load(solver)
    statuses = {_answer(Path(file), solver, time_limit_s, work_limit, tolerance, explain) for file in files}
    return next((code for code in (EXIT_FORMAT, EXIT_INFEASIBLE, EXIT_UNKNOWN) if code in statuses), EXIT_PLANNED)


def _load(solver: str) -> None:
    """Import the solver; print a notice if that takes long because its kernels are being compiled."""
    notice = threading.Timer(
        SLOW_LOAD_S, sys.stderr.write, ("loading the planner; it is compiled once on each machine ...\n",)
    )
    notice.start()
    try:
        load(solver)
    finally:
        notice.cancel()


def _answer(
    file: Path, solver: str, time_limit_s: float, work_limit: int | None, tolerance: float, explain: bool
) -> int:
    from resplit.problem import plan_to_json, read_problem

    try:
        problem: Problem = read_problem(file)
    except ProblemFormatError as error:
        _print_line({"error": str(error), "key": error.key, "file": str(file)})
        return EXIT_FORMAT
    plan = solve(problem, solver=solver, time_limit_s=time_limit_s, work_limit=work_limit, tolerance=tolerance)
    if explain:
        from resplit.planner.explain import explain as explanation

        sys.stdout.write(f"{file}: {explanation(problem, plan)}\n")
    else:
        _print_line(plan_to_json(plan))
    return {"infeasible": EXIT_INFEASIBLE, "unknown": EXIT_UNKNOWN}.get(plan.status, EXIT_PLANNED)


def _print_line(obj: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(obj, allow_nan=False) + "\n")
    sys.stdout.flush()
