"""The evaluation of a placement: objective, terms and violated constraints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from resplit.planner.evaluate import evaluate, moved_bytes, slo_shortfall_s
from resplit.planner.instance import Instance
from resplit.problem import read_problem
from resplit.types import Problem
from tests.support.problems import EVERY_EXAMPLE, EXAMPLES, best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples

PROVEN = [path for path in EVERY_EXAMPLE if json.loads(path.read_text())["known"]["placement"]]


@pytest.mark.parametrize("path", PROVEN, ids=lambda path: path.stem)
def test_a_known_optimum_has_its_known_objective(path: Path) -> None:
    known = json.loads(path.read_text())["known"]

    evaluation = evaluate(read_problem(path), known["placement"])

    assert evaluation.violations == ()
    assert evaluation.objective == pytest.approx(known["objective"], rel=1e-6)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*-batch-*cuts*.json")), ids=lambda path: path.stem)
def test_a_known_optimum_is_the_best_of_all_placements_and_depends_on_shared_passes(path: Path) -> None:
    known, problem = json.loads(path.read_text())["known"], read_problem(path)
    turns = replace(problem, nodes=tuple(replace(node, load_share=1.0) for node in problem.nodes))

    optimum, placement = best_by_enumeration(problem)

    assert optimum == pytest.approx(known["objective"], rel=1e-9)
    assert placement == tuple(known["placement"])
    assert best_by_enumeration(turns)[1] != placement


def test_energy_changes_an_optimum() -> None:
    problem = read_problem(EXAMPLES / "n004-llama3.2-3b-c1-batch-tight-cuts-54.json")
    free = replace(problem, weights=replace(problem.weights, energy=0.0))

    (_, frugal), (_, wasteful) = best_by_enumeration(problem), best_by_enumeration(free)

    assert frugal is not None
    assert wasteful is not None
    assert evaluate(problem, frugal).terms.energy_j < evaluate(problem, wasteful).terms.energy_j


def literal_objective(problem: Problem, placement: tuple[str, ...]) -> float:
    """The objective of docs/problem.md, computed in plain loops."""
    node_of = [problem.node_index(name) for name in placement]
    rate = sum(c.rate_rps for c in problem.classes)
    latency = peak = energy = 0.0
    for i, node in enumerate(problem.nodes):
        u = node.background_utilization
        for c in problem.classes:
            for j, k in enumerate(node_of):
                if k == i:
                    seconds = (
                        c.prompt_tokens * problem.prefill_s_per_token[j, i]
                        + c.new_tokens * problem.decode_s_per_token[j, i]
                    )
                    u += node.load_share * c.rate_rps * seconds
        latency += ((1 - node.background_utilization) / (1 - u) - 1) / node.load_share / rate
        energy += node.compute_w * (u - node.background_utilization) / rate
        peak = max(peak, u)
    for c in problem.classes:
        source = problem.node_index(c.source)
        chain = [source, *node_of, source]
        passes = c.prompt_tokens + c.new_tokens - 1
        for b in range(len(chain) - 1):
            if b == 0:
                size = passes * problem.token_bytes
            elif b < len(node_of):
                size = passes * problem.blocks[b - 1].activation_bytes_per_token
            else:
                size = c.new_tokens * problem.token_bytes
            i, k = chain[b], chain[b + 1]
            if i != k:
                seconds = c.new_tokens * problem.link_latency_s[i, k] + size / problem.link_bandwidth_bytes_per_s[i, k]
                latency += c.rate_rps / rate * seconds
    exposed = sum(b.sensitivity for b, i in zip(problem.blocks, node_of, strict=True) if not problem.nodes[i].trusted)
    weights = problem.weights
    privacy = exposed / len(problem.blocks)
    return weights.latency * latency + weights.balance * peak + weights.privacy * privacy + weights.energy * energy


@given(seeds())
@examples(40)
def test_every_number_follows_the_formulas(seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    _, placement = best_by_enumeration(problem)
    if placement is None:
        return

    evaluation = evaluate(problem, placement)

    assert evaluation.objective == pytest.approx(literal_objective(problem, placement), rel=1e-9)
    rates = [c.rate_rps for c in problem.classes]
    mean = sum(r * t for r, t in zip(rates, evaluation.class_latency_s, strict=True)) / sum(rates)
    assert evaluation.terms.latency_s == pytest.approx(mean, rel=1e-9)
    instance = Instance.of(problem)
    assert instance.cost(instance.nodes_of(placement)) == pytest.approx(evaluation.objective, rel=1e-9)


def test_the_text_of_a_violation_names_the_constraint() -> None:
    problem = read_problem(next(EXAMPLES.glob("n008*nulls*")))
    problem = replace(problem, allowed_cuts=frozenset({3}))
    names = [node.name for node in problem.nodes]

    violations = evaluate(problem, [names[0]] * 17 + [names[1]] * 17).violations

    text_of = {violation.kind: violation.text for violation in reversed(violations)}
    assert text_of["memory"].startswith("memory of node-0: needs")
    assert text_of["privacy"] == "trust: private block embed on node-0, which is not trusted"
    assert text_of["cut"] == "boundary 17 is not an allowed cut"


@pytest.mark.parametrize(
    ("kind", "change", "excess", "limit"),
    [
        ("memory", {"memory_bytes": 1e9}, 1e9, 1e9),
        ("utilization", {"max_utilization": 0.25}, 0.25, 0.25),
        ("utilization", {"background_utilization": 0.25, "max_utilization": 0.5}, 0.25, 0.5),
        ("utilization", {"load_share": 0.5, "max_utilization": 0.125}, 0.125, 0.125),
        ("privacy", {"trusted": False}, 0.0, 0.0),
    ],
)
def test_a_violation_has_its_kind_and_the_amount_above_the_limit(
    kind: str, change: dict[str, float], excess: float, limit: float
) -> None:
    [violation] = evaluate(two_blocks(**change), ["node-0", "node-0"]).violations

    assert (violation.kind, violation.excess, violation.limit) == (kind, pytest.approx(excess), limit)


def test_a_placement_within_every_limit_violates_nothing() -> None:
    assert evaluate(two_blocks(memory_bytes=2e9, max_utilization=0.5), ["node-0", "node-0"]).violations == ()


def test_a_missing_link_and_a_block_that_cannot_run_are_violations() -> None:
    problem = two_blocks()
    unlinked = replace(problem, link_latency_s=np.array([[0, np.nan], [1e-3, 0]]))
    no_times = np.array([[0.5, 0.5], [0.5, np.nan]])
    unable = replace(problem, prefill_s_per_token=no_times, decode_s_per_token=no_times)

    for changed, kind in ((unlinked, "link"), (unable, "cannot_run")):
        assert [each.kind for each in evaluate(changed, ["node-0", "node-1"]).violations] == [kind]


def two_blocks(**node: object) -> Problem:
    """Two blocks of 1 GB, each loading a node by 0.25, the first private. `node` changes the first of two nodes."""
    problem = tiny_problem(3, blocks=2, nodes=2)
    roomy = {
        "memory_bytes": 1e12, "background_utilization": 0.0, "max_utilization": 0.9, "trusted": True,
        "load_share": 1.0, "compute_w": 0.0,
    }  # fmt: skip
    return replace(
        problem,
        blocks=tuple(
            replace(block, weight_bytes=1e9, kv_bytes_per_token=0.0, private=j == 0)
            for j, block in enumerate(problem.blocks)
        ),
        nodes=(
            replace(problem.nodes[0], **(roomy | node)),  # type: ignore[arg-type]
            replace(problem.nodes[1], **roomy),  # type: ignore[arg-type]
        ),
        classes=(replace(problem.classes[0], source="node-0", rate_rps=0.25, prompt_tokens=1, new_tokens=1),),
        prefill_s_per_token=np.full((2, 2), 0.5),
        decode_s_per_token=np.full((2, 2), 0.5),
        link_latency_s=np.full((2, 2), 1e-3),
        link_bandwidth_bytes_per_s=np.full((2, 2), 1e9),
    )


def test_a_full_node_makes_the_objective_infinite() -> None:
    problem = tiny_problem(3)
    rushed = replace(problem, classes=tuple(replace(c, rate_rps=1e6) for c in problem.classes))

    assert math.isinf(evaluate(rushed, ["node-0"] * 5).objective)


def test_moved_bytes_count_weights_and_caches_of_moved_blocks() -> None:
    problem = replace(tiny_problem(3), current=("node-0", "node-0", "gone", "node-1", "node-1"))
    blocks = problem.blocks

    moved = moved_bytes(problem, ["node-0", "node-1", "node-1", "node-1", "node-1"])

    assert moved == pytest.approx(sum(b.weight_bytes + 1000 * b.kv_bytes_per_token for b in blocks[1:3]))


def test_the_shortfall_of_a_missed_objective_is_in_seconds() -> None:
    problem = tiny_problem(3)
    problem = replace(problem, classes=tuple(replace(c, slo_s=1e-6) for c in problem.classes))
    evaluation = evaluate(problem, ["node-0"] * 5)

    shortfall = slo_shortfall_s(problem, evaluation)

    assert list(shortfall.values()) == pytest.approx(evaluation.class_latency_s - 1e-6)
