"""Tiny problems for the planner's tests, and the optimum of each by enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from resplit.planner.evaluate import evaluate
from resplit.problem import problem_from_json
from resplit.types import Problem

EXAMPLES = Path(__file__).parent.parent / "data" / "problems"
EVERY_EXAMPLE = sorted(EXAMPLES.glob("*.json"))


def tiny_problem(seed: int, blocks: int = 5, nodes: int = 3, **changes: object) -> Problem:
    """A random problem, small enough to enumerate its placements. Some have no legal one.

    Odd seeds have a `load_share` below 1 on most nodes, and two of three of them a price of energy.
    """
    rng = np.random.default_rng(seed)
    times = rng.uniform(0.2e-3, 4e-3, (blocks, nodes))
    runs = rng.random((blocks, nodes)) > 0.08
    latency = rng.uniform(0.3e-3, 30e-3, (nodes, nodes))
    bandwidth = rng.uniform(1e6, 1e8, (nodes, nodes))
    linked = (rng.random((nodes, nodes)) > 0.08) | np.eye(nodes, dtype=bool)
    need = rng.uniform(0.5, 1.5, blocks) * 1e9
    obj: dict[str, Any] = {
        "version": 1,
        "blocks": [
            {
                "name": f"block-{j}", "weight_bytes": float(need[j]), "kv_bytes_per_token": 1e4,
                "activation_bytes_per_token": 4096.0, "private": bool(j == 0 and rng.random() < 0.5),
                "sensitivity": float(rng.random()),
            }
            for j in range(blocks)
        ],
        "nodes": [
            {
                "name": f"node-{i}", "memory_bytes": float(need.sum() * rng.uniform(0.3, 1.2)),
                "background_utilization": float(rng.uniform(0, 0.4)), "max_utilization": 0.95,
                "trusted": bool(i == 0 or rng.random() < 0.6),
            }
            for i in range(nodes)
        ],
        "classes": [
            {
                "name": f"class-{r}", "source": f"node-{rng.integers(nodes)}", "rate_rps": float(rng.uniform(0.1, 0.7)),
                "prompt_tokens": 100, "new_tokens": int(rng.integers(1, 60)),
            }
            for r in range(int(rng.integers(1, 4)))
        ],
        "prefill_s_per_token": _nullable(times / 10, runs),
        "decode_s_per_token": _nullable(times, runs),
        "link_latency_s": _nullable(latency, linked),
        "link_bandwidth_bytes_per_s": _nullable(bandwidth, linked),
        "kv_tokens": 1000,
        "weights": {"latency": 1.0, "balance": float(rng.choice([0, 0.5])), "privacy": float(rng.choice([0, 1]))},
    }  # fmt: skip
    if seed % 2:
        _share_passes(obj, np.random.default_rng([seed, 1]))
    return problem_from_json(obj | changes)


def _share_passes(obj: dict[str, Any], rng: np.random.Generator) -> None:
    for node in obj["nodes"]:
        node["load_share"] = float(rng.choice([1.0, rng.uniform(0.05, 1.0), rng.uniform(0.05, 0.3)]))
        node["compute_w"] = float(rng.uniform(0, 60))
    obj["weights"]["energy"] = float(rng.choice([0.0, 0.002, 0.05]))


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32 - 1)


def best_by_enumeration(problem: Problem) -> tuple[float, tuple[str, ...] | None]:
    """Objective and placement of the optimum, or (inf, None) if no placement is legal."""
    best: tuple[float, tuple[str, ...] | None] = (float("inf"), None)
    cuts = range(1, len(problem.blocks)) if problem.allowed_cuts is None else sorted(problem.allowed_cuts)
    lengths = [end - begin for begin, end in itertools.pairwise([0, *cuts, len(problem.blocks)])]
    for parts in itertools.product([node.name for node in problem.nodes], repeat=len(lengths)):
        placement = tuple(name for name, length in zip(parts, lengths, strict=True) for _ in range(length))
        evaluation = evaluate(problem, placement)
        if not evaluation.violations and evaluation.objective < best[0]:
            best = evaluation.objective, placement
    return best


def _nullable(matrix: np.ndarray, kept: np.ndarray) -> list[list[float | None]]:
    return [
        [float(v) if keep else None for v, keep in zip(row, mask, strict=True)]
        for row, mask in zip(matrix, kept, strict=True)
    ]
