"""The planner's benchmark: all solvers on the same generated problems. It writes the table and the plot in docs/.

Run it with `python -m benchmarks.planner [--only PREFIX]`. A solve uses one core. Times are solve times, without the
time to generate a problem.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.planner_instances import Spec, drifted, generate, suite
from resplit.planner import SOLVERS, solve
from resplit.planner.bound.dual import Dual
from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.bound.resources import Resources
from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate
from resplit.planner.instance import Instance
from resplit.planner.replan import Replanner
from resplit.planner.search.descent import Descent
from resplit.problem import problem_from_json
from resplit.types import Plan, Problem

mpl.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
BASELINES = [name for name in SOLVERS if name not in ("relax", "exact")]


@dataclass(frozen=True)
class SolverRow:
    """One run of a solver. `objective` and `bound` may be None. `load` is the load of the whole machine."""

    instance: str
    nodes: int
    blocks: int
    memory_ratio: float | None
    run: str
    status: str
    objective: float | None
    bound: float | None
    solve_s: float
    load: float


def short_limit_s(nodes: int) -> float:
    """The time limit within which a plan should be near the optimum."""
    return 1.0 if nodes <= 32 else 5.0 if nodes <= 128 else 30.0


def row(spec: Spec, problem: Problem, run: str, plan: Plan) -> SolverRow:
    """The row of a plan, whose objective and constraints are checked."""
    if plan.placement is not None and plan.objective is not None:
        evaluation = evaluate(problem, plan.placement)
        assert not evaluation.violations, (spec.name, run, evaluation.violations)
        assert abs(evaluation.objective - plan.objective) <= 1e-6 * plan.objective
    return SolverRow(
        spec.name, spec.nodes, len(problem.blocks), spec.memory_ratio, run, plan.status, plan.objective,
        plan.lower_bound, plan.solve_s, os.getloadavg()[0],
    )  # fmt: skip


def plain_descent(problem: Problem, time_limit_s: float) -> float | None:
    """Objective of steepest descent over interval moves alone, with random restarts until the time limit."""
    instance = Instance.of(problem)
    budget = Budget(time_limit_s)
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    value, first = dual.evaluate(dual.prices)
    descent = Descent(instance, 3 * value)
    random = np.random.default_rng(0)
    best, start = float("inf"), first
    while not budget.spent:
        best = min(best, instance.cost(descent.descend(start, budget)))
        start = first.copy()
        for _ in range(3):
            p = int(random.integers(len(start)))
            q = min(len(start), p + 1 + int(random.integers(len(start) // 2)))
            runs = np.flatnonzero((instance.blocked_prefix[q] == instance.blocked_prefix[p]) & (instance.headroom > 0))
            start[p:q] = random.choice(runs) if len(runs) else start[p:q]
    return best if best < float("inf") else None


def measure(spec: Spec) -> list[SolverRow]:
    """Run all solvers on the problem of `spec`."""
    problem = problem_from_json(generate(spec))
    limit = short_limit_s(spec.nodes)
    rows = [row(spec, problem, f"relax {limit:g} s", solve(problem, time_limit_s=limit))]
    if spec.nodes <= 128:
        rows.append(row(spec, problem, "relax 10 s", solve(problem, time_limit_s=10.0)))
    if 64 <= spec.nodes <= 128 and rows[0].status != "infeasible":
        rows.append(
            SolverRow(spec.name, spec.nodes, len(problem.blocks), spec.memory_ratio, "descent 20 s", "-",
                plain_descent(problem, 20.0), None, 20.0, os.getloadavg()[0])
        )  # fmt: skip
    rows += [row(spec, problem, name, solve(problem, solver=name, time_limit_s=10.0)) for name in BASELINES]
    for r in rows:
        print(f"{r.instance:45} {r.run:14} {r.status:10} {r.objective} {r.bound} {r.solve_s:.2f}", flush=True)
    return rows


def measure_replanning() -> list[tuple[float, float]]:
    """Wall and processor seconds to re-plan drifted states of 16 nodes and 34 blocks, from the last plan."""
    seconds = []
    for seed, memory_ratio in ((1, None), (2, None), (3, 1.5), (4, 1.8)):
        raw = generate(Spec(seed, 16, "llama2-7b", 1 + seed % 3, memory_ratio))
        replanner = Replanner(problem_from_json(raw), time_limit_s=5.0)
        for drift in range(10):
            problem = problem_from_json(drifted(raw, drift))
            wall, processor = time.perf_counter(), time.process_time()
            plan = replanner.solve(problem)
            seconds.append((time.perf_counter() - wall, time.process_time() - processor))
            assert plan.placement is None or not evaluate(problem, plan.placement).violations
    return seconds


def best_of(rows: list[SolverRow]) -> dict[str, float]:
    """The least objective found for each instance."""
    best: dict[str, float] = {}
    for r in rows:
        if r.objective is not None:
            best[r.instance] = min(best.get(r.instance, r.objective), r.objective)
    return best


def write_table(rows: list[SolverRow], replanning: list[tuple[float, float]], path: Path) -> None:
    sections = (instance_table(rows), solver_table(rows), against_descent(rows), gap_table(rows),
                replanning_times(replanning), machine(rows))  # fmt: skip
    path.write_text("\n".join(line for section in sections for line in section) + "\n")


def instance_table(rows: list[SolverRow]) -> list[str]:
    """The best objective, its ratio within the short limit and its gap for each instance."""
    best, bound = best_of(rows), bounds_of(rows)
    lines = [
        "# Planner benchmark", "",
        "Written by `python -m benchmarks.planner`; `benchmarks/planner_instances.py` generates the problems.", "",
        "- *Ratio*: the objective divided by the best objective that any run found.",
        "- *Gap*: the certified gap, (best - bound) / best, after 10 s (30 s at 512 nodes).", "",
        "| instance | blocks | status | best | short limit | ratio at limit | gap | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in dict.fromkeys(r.instance for r in rows):
        mine = [r for r in rows if r.instance == name]
        first, last = mine[0], [r for r in mine if r.run.startswith("relax")][-1]
        ratio = f"{first.objective / best[name]:.4f}" if first.objective else "-"
        gap = f"{max(0.0, 1 - bound[name] / best[name]):.2%}" if name in best and name in bound else "-"
        shown = f"{best[name]:.5g}" if name in best else "-"
        limit = f"{short_limit_s(first.nodes):g} s"
        lines.append(
            f"| {name} | {first.blocks} | {last.status} | {shown} | {limit} | {ratio} | {gap} | {last.solve_s:.2f} |"
        )
    return lines


def solver_table(rows: list[SolverRow]) -> list[str]:
    """The number of plans, the ratios and the solve time of each solver."""
    best = best_of(rows)
    lines = ["", "## Solvers on the same problems", "", "| solver | plans | median ratio | worst ratio | median s |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for run, mine in by_run(rows).items():
        ratios = [r.objective / best[r.instance] for r in mine if r.objective is not None]
        feasible = sum(r.instance in best for r in mine)
        numbers = f"{np.median(ratios):.3f} | {max(ratios):.3f}" if ratios else "- | -"
        lines.append(
            f"| {run} | {len(ratios)} of {feasible} | {numbers} | {np.median([r.solve_s for r in mine]):.3f} |"
        )
    return lines


def gap_table(rows: list[SolverRow]) -> list[str]:
    """The certified gaps by number of nodes, with ample and with scarce memory."""
    best, bound = best_of(rows), bounds_of(rows)
    lines = ["", "## Certified gap by size", "", "| nodes | memory | median gap | worst gap | at most 1e-4 |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for nodes in sorted({r.nodes for r in rows}):
        for scarce in (False, True):
            names = {r.instance for r in rows if r.nodes == nodes and bool(r.memory_ratio) == scarce}
            gaps = [max(0.0, 1 - bound[n] / best[n]) for n in names if n in best and n in bound]
            if gaps:
                lines.append(
                    f"| {nodes} | {'scarce' if scarce else 'ample'} | {np.median(gaps):.2%} | {max(gaps):.2%} | "
                    f"{sum(g <= 1e-4 for g in gaps)} of {len(gaps)} |"
                )
    return lines


def replanning_times(replanning: list[tuple[float, float]]) -> list[str]:
    """Wall and processor times of re-planning; no lines if it was not measured."""
    if not replanning:
        return []
    lines = ["", "## Re-planning, 16 nodes x 34 blocks", ""]
    for what, ms in zip(("wall", "processor"), np.array(replanning).T * 1e3, strict=True):
        lines.append(
            f"- {what} time of {len(ms)} drifted states: median {np.median(ms):.0f} ms, 9 of 10 below "
            f"{np.quantile(ms, 0.9):.0f} ms, worst {ms.max():.0f} ms"
        )
    return lines


def machine(rows: list[SolverRow]) -> list[str]:
    """The machine and its load during the runs."""
    load = [r.load for r in rows]
    return ["", "## The machine", "",
            f"{os.cpu_count()} cores. The load (1 minute) during the runs was {np.median(load):.1f} in the median "
            f"and at most {max(load):.1f}.",
            "A solve uses one core. It gets less processor time if the load exceeds the number of cores.",
            ]  # fmt: skip


def against_descent(rows: list[SolverRow]) -> list[str]:
    """The planner within its short limit and 20 s of plain descent with restarts, for each problem."""
    lines = ["", "## Against 20 s of plain interval-move descent with restarts", "",
             "| instance | relax | seconds | descent | seconds | relax / descent |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    first = {r.instance: r for r in reversed(rows) if r.run.startswith("relax")}
    for descent in (r for r in rows if r.run.startswith("descent")):
        mine = first[descent.instance]
        shown = [
            f"{r.objective:.5g} | {r.solve_s:.2f}" if r.objective else f"- | {r.solve_s:.2f}" for r in (mine, descent)
        ]
        ratio = f"{mine.objective / descent.objective:.4f}" if mine.objective and descent.objective else "-"
        lines.append(f"| {descent.instance} | {' | '.join(shown)} | {ratio} |")
    return lines if len(lines) > 5 else []


def bounds_of(rows: list[SolverRow]) -> dict[str, float]:
    """The highest proven bound of each instance."""
    bound: dict[str, float] = {}
    for r in rows:
        if r.bound is not None:
            bound[r.instance] = max(bound.get(r.instance, r.bound), r.bound)
    return bound


def by_run(rows: list[SolverRow]) -> dict[str, list[SolverRow]]:
    groups: dict[str, list[SolverRow]] = {}
    for r in rows:
        groups.setdefault(r.run, []).append(r)
    return groups


def draw(rows: list[SolverRow], path: Path) -> None:
    """Plot the ratio to the best objective against the solve time, one point per run."""
    best = best_of(rows)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for run, mine in by_run(rows).items():
        points = [(max(r.solve_s, 1e-4), r.objective / best[r.instance]) for r in mine if r.objective is not None]
        axes.scatter([solve_s for solve_s, _ in points], [ratio for _, ratio in points], s=14, label=run)
    axes.set(xscale="log", yscale="log", xlabel="solve time (s)", ylabel="objective / best known")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write_rows(rows: list[SolverRow], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SolverRow.__annotations__)
        writer.writerows([*vars(r).values()] for r in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="prefix of the instances' names")
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    rows = [r for spec in suite() if spec.name.startswith(arguments.only) for r in measure(spec)]
    replanning = measure_replanning() if not arguments.only else []
    write_rows(rows, arguments.out / "planner-benchmark.csv")
    write_table(rows, replanning, arguments.out / "planner-benchmark.md")
    draw(rows, arguments.out / "planner-benchmark.svg")


if __name__ == "__main__":
    main()
