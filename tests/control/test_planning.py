"""Plans that the controller makes itself, under the current rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resplit.config import ClusterConfig
from resplit.control import planning
from resplit.control.cluster_view import ClusterView
from resplit.control.planning import (
    ControllerPlanner,
    context_warning,
    load_problem,
    plan_without,
    save_problem,
    under_rules,
    without,
)
from resplit.epochs import RECOVER
from resplit.errors import CapacityError, DataError, InfeasibleError
from resplit.model.source import StoredModel
from resplit.planner.best_effort import BestEffortPlan
from resplit.types import Problem, RequestClass
from resplit.wire.addresses import Address
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C, three_node_config

CURRENT = (A, A, B, B, C, C, B, A)


@pytest.fixture
def cluster() -> ClusterConfig:
    return three_node_config(kv_tokens=64, limits={})


@pytest.fixture
def problem(cluster: ClusterConfig, stored_model: StoredModel) -> Problem:
    return problem_of(cluster, stored_model.features(1), CURRENT)


def test_a_node_that_may_not_be_used_gets_no_block_and_keeps_its_links(problem: Problem) -> None:
    for unused in (A, B, C):
        assert unused not in (plan_without(problem, [unused], CURRENT).plan.placement or ())
    reduced = without(problem, [A])
    assert np.isnan(reduced.decode_s_per_token[:, 0]).all()
    assert np.array_equal(reduced.link_latency_s, problem.link_latency_s, equal_nan=True)


def test_a_plan_keeps_the_current_rules_and_not_those_of_the_latest_problem(problem: Problem) -> None:
    strict = under_rules(problem, [B], problem.blocks)
    placement = plan_without(strict, [], CURRENT).plan.placement
    assert placement is not None
    assert {placement[block] for block in (0, 1, 7)} == {B}
    untrusted = plan_without(under_rules(problem, [], problem.blocks), [], CURRENT).plan
    assert untrusted.placement is None
    assert untrusted.reason


def test_the_latest_problem_survives_a_restart(problem: Problem, tmp_path: Path) -> None:
    assert load_problem(tmp_path / "latest_problem.json") is None
    save_problem(problem, tmp_path / "latest_problem.json")
    kept = load_problem(tmp_path / "latest_problem.json")
    assert kept is not None
    assert (kept.blocks, kept.nodes, kept.current) == (problem.blocks, problem.nodes, problem.current)


def test_a_problem_that_a_full_disk_refuses_is_named_and_the_saved_one_stays(
    problem: Problem, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    file = tmp_path / "latest_problem.json"
    save_problem(problem, file)
    saved = file.read_bytes()
    with full_disk(10), pytest.raises(CapacityError, match=r"latest_problem\.json: cannot be written \("):
        save_problem(replace(problem, kv_tokens=1), file)
    assert file.read_bytes() == saved


def test_a_context_that_no_placement_can_generate_in_time_is_warned_of(problem: Problem) -> None:
    token_s = float(np.nanmin(problem.decode_s_per_token, axis=1).sum())
    assert context_warning(problem, 100, 100 * token_s) is None  # just in time
    warning = context_warning(without(problem, [B]), 100, 99 * token_s)
    assert warning is not None
    assert "limits: 100 tokens take at least" in warning
    assert "lower context_tokens or raise deadline" in warning


class ConnectedNodes:
    """The part of a gateway that a plan needs: which nodes answer, and which were faulty."""

    def __init__(self, *names: str) -> None:
        self._names = set(names)
        self.faulty: frozenset[str] = frozenset()

    def suspects(self) -> frozenset[str]:
        return self.faulty

    def connected_nodes(self) -> set[str]:
        return self._names

    def demand(self, window_s: float) -> list[RequestClass]:
        return [RequestClass("chat", A, window_s, 8, 8)]


def planner_of(cluster: ClusterConfig, model: StoredModel, folder: Path, *connected: str) -> ControllerPlanner:
    gateway: Any = ConnectedNodes(*connected)
    addresses = {name: Address("127.0.0.1", 1) for name in cluster.node_names}
    return ControllerPlanner(ClusterView(cluster, model, addresses, gateway), folder / "latest_problem.json")


async def test_a_plan_uses_the_nodes_that_answer(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner = planner_of(cluster, stored_model, tmp_path, A, B)
    planner.set_problem(problem)
    proposal = await planner.plan(CURRENT, based_on=3)
    assert set(proposal.placement) <= {A, B}
    assert (proposal.action, proposal.based_on) == (RECOVER, 3)


async def test_nodes_that_refused_or_were_faulty_are_used_only_if_there_is_no_other_way(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner = planner_of(cluster, stored_model, tmp_path, A, B, C)
    planner.set_problem(problem)
    assert set((await planner.plan(CURRENT, 0, avoid=frozenset({B, C}))).placement) == {A}
    gateway: Any = planner._view.gateway
    gateway.faulty = frozenset({A})
    assert A not in (await planner.plan(CURRENT, 0)).placement
    proposal = await planner.plan(CURRENT, 0, avoid=frozenset({B}))  # no other node is trusted
    assert {A, B} & set(proposal.placement)


async def test_without_a_problem_there_is_no_plan_and_the_lost_nodes_are_named(
    cluster: ClusterConfig, stored_model: StoredModel, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^gamma lost, and there is no problem to plan with yet$"):
        await planner_of(cluster, stored_model, tmp_path, A, B).plan(CURRENT, based_on=0)


async def test_without_a_trusted_node_there_is_no_plan_and_the_reason_is_given(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner = planner_of(cluster, stored_model, tmp_path, C)
    planner.set_problem(problem)
    with pytest.raises(InfeasibleError, match=r"^without alpha, beta there is no placement: no trusted node can"):
        await planner.plan(CURRENT, based_on=0)


async def test_a_proposal_has_the_latency_and_the_bound_of_its_plan(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner = planner_of(cluster, stored_model, tmp_path, A, B, C)
    planner.set_problem(problem)
    proposal = await planner.plan(CURRENT, based_on=3, action="drain")
    plan = plan_without(problem, [], CURRENT).plan
    assert plan.terms is not None
    assert proposal.action == "drain"
    assert proposal.predicted_latency_s == pytest.approx(plan.terms.latency_s)
    assert proposal.lower_bound is not None
    assert 0 < proposal.lower_bound <= proposal.predicted_latency_s


async def test_a_restarted_controller_plans_from_the_saved_problem(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner_of(cluster, stored_model, tmp_path, A, B, C).set_problem(problem)
    proposal = await planner_of(cluster, stored_model, tmp_path, A, B).plan(CURRENT, based_on=0)
    assert set(proposal.placement) <= {A, B}


async def test_a_problem_for_another_model_is_no_problem_to_plan_with(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner = planner_of(cluster, stored_model, tmp_path, A, B, C)
    planner.set_problem(replace(problem, blocks=problem.blocks[:-1]))
    with pytest.raises(DataError, match=r"^there is no problem to plan with yet$"):
        await planner.plan(CURRENT, based_on=0)


async def test_a_node_that_left_the_cluster_and_a_drained_one_get_no_block(
    problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    nodes = [{"name": name, "memory": "8 MiB"} for name in (A, B)]
    smaller = three_node_config(kv_tokens=64, limits={}, nodes=nodes)
    planner = planner_of(smaller, stored_model, tmp_path, A, B, C)
    planner.set_problem(problem)
    assert C not in (await planner.plan(CURRENT, based_on=0)).placement
    whole = three_node_config(kv_tokens=64, limits={})
    planner = planner_of(whole, stored_model, tmp_path, A, B, C)
    planner._view.rules = replace(planner._view.rules, drained=frozenset({B}))
    assert B not in (await planner.plan(CURRENT, based_on=0)).placement


async def test_the_present_problem_has_todays_placement_demand_and_nodes(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner = planner_of(cluster, stored_model, tmp_path, A, B)
    planner.set_problem(problem)
    present = planner.present_problem(CURRENT, 30.0)
    assert (present.current, present.classes) == (CURRENT, (RequestClass("chat", A, 30.0, 8, 8),))
    usable = np.isfinite(present.decode_s_per_token).any(axis=0)
    assert dict(zip((node.name for node in present.nodes), usable, strict=True)) == {A: True, B: True, C: False}


async def test_every_try_plans_from_the_current_placement(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[set[str], tuple[str, ...]]] = []

    def recorded(problem: Problem, unused: Collection[str], current: tuple[str, ...]) -> BestEffortPlan:
        asked.append((set(unused), current))
        return plan_without(problem, unused, current)

    monkeypatch.setattr(planning, "plan_without", recorded)
    planner = planner_of(cluster, stored_model, tmp_path, A, B, C)
    planner.set_problem(problem)
    await planner.plan(CURRENT, 0, avoid=frozenset({A, B}))  # no other node is trusted
    assert asked == [({A, B}, CURRENT), (set(), CURRENT)]


@pytest.mark.parametrize(
    ("ready", "used"), [((A,) * 8, True), ((A, A, B, B, A, B, B, A), True), ((A, A, C, B, B, B, B, A), False)]
)
async def test_what_was_planned_for_a_loss_is_used_if_its_nodes_answer(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path,
    ready: tuple[str, ...], used: bool,
) -> None:  # fmt: skip
    planner = planner_of(cluster, stored_model, tmp_path, A, B)
    planner.set_problem(problem)
    asked: list[tuple[int, list[str]]] = []

    def after_loss(epoch: int, lost: Sequence[str]) -> tuple[str, ...]:
        asked.append((epoch, list(lost)))
        return ready

    planner.after_loss = after_loss
    proposal = await planner.plan(CURRENT, based_on=3, action="drain")
    assert asked == [(3, [C])]
    assert (proposal.action, proposal.based_on) == ("drain", 3)
    assert (proposal.lower_bound is None) == used  # nothing is proven for a placement that was planned before
    assert (proposal.placement == ready) == used
    assert proposal.predicted_latency_s is not None
    assert proposal.predicted_latency_s > 0


def test_more_demand_than_the_nodes_can_serve_is_planned_for_in_part(problem: Problem) -> None:
    heavy = replace(problem, classes=tuple(replace(c, rate_rps=1e4 * c.rate_rps) for c in problem.classes))
    found = plan_without(heavy, [], CURRENT)
    assert found.plan.placement is not None
    assert "of the demand" in found.note


async def test_busy_nodes_are_used_above_their_ceilings_and_the_proposal_says_so(
    cluster: ClusterConfig, problem: Problem, stored_model: StoredModel, tmp_path: Path
) -> None:
    planner = planner_of(cluster, stored_model, tmp_path, A, B, C)
    busy = tuple(replace(node, background_utilization=0.97) for node in problem.nodes)
    planner.set_problem(replace(problem, nodes=busy))
    proposal = await planner.plan(CURRENT, based_on=3)
    assert "no plan keeps max_utilization: alpha is planned to be 97." in proposal.note
