"""The examples of docs/research.md do what the page says, as they stand there."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from resplit.config import load_cluster
from resplit.decide import Settings
from resplit.planner import SOLVERS, solve
from resplit.policies import Situation, make_policy
from resplit.problem import read_problem
from resplit.scenario import load_scenario

ROOT = Path(__file__).parents[1]
PROBLEM = read_problem(ROOT / "tests/data/problems/n004-smollm2-135m-c1-11.json")
YAML, POLICY, BASELINE = (
    text for _, text in re.findall(r"```(yaml|python)\n(.*?)```", (ROOT / "docs/research.md").read_text(), re.S)
)


def module_of(code: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The code as the module `mine`."""
    mine = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", mine)
    exec(compile(code, "<docs/research.md>", "exec"), mine.__dict__)
    return mine


def test_the_scenario_can_be_played_by_the_home_cluster(tmp_path: Path) -> None:
    file = tmp_path / "evening.yaml"
    file.write_text(YAML)
    scenario = load_scenario(file)
    scenario.check_against(load_cluster(ROOT / "data/clusters/home.yaml"), "docs/research.md")
    scenario.check_live("docs/research.md")


def test_the_policy_moves_away_from_a_bad_placement_and_keeps_a_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of(POLICY, monkeypatch)
    policy, rng = make_policy("mine:Eager"), np.random.default_rng(0)
    good = solve(PROBLEM, solver="relax", time_limit_s=2.0).placement
    assert good is not None
    names = [node.name for node in PROBLEM.nodes]  # a hop after each block that may be anywhere
    bad = tuple(
        node if block.private else names[index % len(names)]
        for index, (node, block) in enumerate(zip(good, PROBLEM.blocks, strict=True))
    )

    moved = policy.decide(Situation(0.0, replace(PROBLEM, current=bad), Settings()), rng)
    kept = policy.decide(Situation(0.0, replace(PROBLEM, current=good), Settings()), rng)

    assert moved.action in ("redistribute", "re-split")
    assert kept.action == "keep"


def test_the_baseline_answers_as_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of(BASELINE, monkeypatch)
    monkeypatch.setitem(SOLVERS, "single", "mine")
    plan = solve(PROBLEM, solver="single", time_limit_s=2.0)
    assert plan.placement is None or len(set(plan.placement)) == 1
    assert (plan.placement is None) == (plan.reason is not None)
