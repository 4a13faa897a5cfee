"""Small placement problems for tests of decisions, a fixed one and random ones, and decisions on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from resplit.decide import Decision, History, Measured, PastMove, Settings, decide
from resplit.planner.evaluate import evaluate
from resplit.types import Block, Node, Problem, RequestClass, Weights

BLOCKS = 8
MB = 1e6
# A limit in solver steps instead of time, so that a problem always has the same answer.
SETTINGS = Settings(work_limit=300, registry_bytes_per_s=1e9)
FAST, SLOW, FAR = "fast", "slow", "far"


def problem(
    current: tuple[str, ...],
    decode_s: tuple[float, float, float] = (1e-3, 2e-3, 4e-3),
    rate_rps: float = 0.5,
) -> Problem:
    """Eight blocks on three nodes (the first two trusted); block 0 is private; memory for at most six on each."""
    return Problem(
        blocks=tuple(Block(f"block-{j}", 20 * MB, 1e3, 4096.0, j == 0, 0.5) for j in range(BLOCKS)),
        nodes=tuple(Node(name, 6 * 21 * MB, 0.1, 0.95, name != FAR) for name in (FAST, SLOW, FAR)),
        classes=(RequestClass("chat", FAST, rate_rps, 64, 32),),
        prefill_s_per_token=np.tile(np.array(decode_s) / 4, (BLOCKS, 1)),
        decode_s_per_token=np.tile(np.array(decode_s), (BLOCKS, 1)),
        link_latency_s=np.full((3, 3), 2e-3),
        link_bandwidth_bytes_per_s=np.full((3, 3), 2e7),
        kv_tokens=500,
        weights=Weights(),
        current=current,
    )


def halves(first: str, second: str, cut: int = 4) -> tuple[str, ...]:
    """The first `cut` blocks on one node, the rest on another."""
    return (first,) * cut + (second,) * (BLOCKS - cut)


def random_problem(seed: int) -> Problem:
    """Random times, links, memory, trust and load. The current placement is random too, and may be illegal."""
    rng = np.random.default_rng(seed)
    nodes = 4
    runs = rng.random((BLOCKS, nodes)) > 0.05
    linked = rng.random((nodes, nodes)) > 0.05
    names = [f"node-{i}" for i in range(nodes)]
    times = np.where(runs, rng.uniform(2e-4, 4e-3, (BLOCKS, nodes)), np.nan)
    current = tuple(str(name) for name in rng.choice(names, 3)[np.sort(rng.integers(0, 3, BLOCKS))])
    return Problem(
        blocks=tuple(
            Block(f"block-{j}", float(rng.uniform(5, 30)) * MB, 1e3, 4096.0, bool(j == 0), 0.5) for j in range(BLOCKS)
        ),
        nodes=tuple(
            Node(name, float(rng.uniform(50, 250)) * MB, float(rng.uniform(0, 0.4)), 0.95, bool(rng.random() < 0.7))
            for name in names
        ),
        classes=(RequestClass("chat", "node-0", float(rng.uniform(0.1, 3)), 64, 32, slo_s=1.0),),
        prefill_s_per_token=times / 5,
        decode_s_per_token=times,
        link_latency_s=np.where(linked, rng.uniform(3e-4, 2e-2, (nodes, nodes)), np.nan),
        link_bandwidth_bytes_per_s=np.where(linked, rng.uniform(1e6, 1e8, (nodes, nodes)), np.nan),
        kv_tokens=500,
        weights=Weights(),
        current=current,
    )


def noisy(problem: Problem, share: float, rng: np.random.Generator) -> Problem:
    """The same cluster as seen by a fit: all times are off by `share` (one standard deviation), loads by 0.02."""

    def off(matrix: np.ndarray) -> np.ndarray:
        return matrix * np.exp(share * rng.standard_normal(matrix.shape))

    def busy(node: Node) -> Node:
        background = node.background_utilization + 0.02 * rng.standard_normal()
        return replace(node, background_utilization=float(np.clip(background, 0, 0.9)))

    return replace(
        problem,
        prefill_s_per_token=off(problem.prefill_s_per_token),
        decode_s_per_token=off(problem.decode_s_per_token),
        link_latency_s=off(problem.link_latency_s),
        link_bandwidth_bytes_per_s=off(problem.link_bandwidth_bytes_per_s),
        nodes=tuple(busy(node) for node in problem.nodes),
    )


NO_HISTORY = History()
BEST = halves(FAST, SLOW, 6)  # the fast node holds as many blocks as it can


def decide_on(
    cluster: Problem,
    now_s: float = 1000.0,
    options: Settings = SETTINGS,
    history: History = NO_HISTORY,
    uncertainty: float = 0.02,
    measured: Measured | None = None,
) -> Decision:
    """The orchestrator's decision, with a solver that is limited in steps."""
    return decide(cluster, now_s=now_s, settings=options, history=history, uncertainty=uncertainty, measured=measured)


def predicted_s(cluster: Problem, placement: tuple[str, ...]) -> float:
    """The predicted latency of a placement."""
    return evaluate(cluster, placement).terms.latency_s


def moved(action: str = "re-split", before: tuple[str, ...] = BEST, before_s: float | None = 1.0) -> PastMove:
    """A move to an equal split at 990 s, before which requests took `before_s`."""
    return PastMove(990.0, action, before, halves(FAST, SLOW, 4), before_s, predicted_s(problem(before), before))
