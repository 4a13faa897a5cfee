"""The explanation of a plan as text."""

from __future__ import annotations

from dataclasses import replace

from resplit.planner import solve
from resplit.planner.explain import explain
from resplit.problem import read_problem
from tests.support.problems import EXAMPLES


def test_the_page_shows_the_chain_the_latency_and_the_gains_of_more_resources() -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c2-tight-nulls-19.json")

    page = explain(problem, solve(problem, time_limit_s=1.0), time_limit_s=2.0)

    assert "[node-2, node-4]" in page
    assert "holds private blocks" in page
    assert "missed by" in page
    assert "memory binds" in page
    assert "1 GiB more on node-3: -" in page
    assert "trust in node-" in page


def test_an_infeasible_problem_is_explained_by_its_reason() -> None:
    problem = read_problem(EXAMPLES / "n005-llama3.2-1b-c1-tight-20.json")

    page = explain(problem, solve(problem))

    assert page.startswith("infeasible")
    assert "memory short by 150.0 MiB (157338829 bytes)" in page


def test_without_a_binding_limit_no_gain_is_shown() -> None:
    problem = read_problem(EXAMPLES / "n004-smollm2-135m-c1-11.json")
    problem = replace(problem, nodes=tuple(replace(node, trusted=True) for node in problem.nodes))

    assert "nothing: no memory, trust or ceiling" in explain(problem, solve(problem))


def test_shared_passes_and_energy_are_shown_where_the_problem_has_them() -> None:
    problem = read_problem(EXAMPLES / "n008-llama3.2-3b-c1-batch-tight-33.json")
    plain = read_problem(EXAMPLES / "n004-smollm2-135m-c1-11.json")

    plan = solve(problem, solver="greedy")
    page, other = explain(problem, plan, time_limit_s=0.0), explain(plain, solve(plain), time_limit_s=0.0)

    assert plan.terms is not None
    assert f"energy {plan.terms.energy_j:.4g} J per request" in page
    assert ", load share 0." in page
    assert " W above idle" in page
    assert "energy" not in other
    assert "load share" not in other
