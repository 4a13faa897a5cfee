"""Explains a plan as text (`resplit plan --explain`).

The gain from relaxing a constraint is found by solving the changed problem, not from dual prices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.evaluate import block_bytes, evaluate
from resplit.planner.instance import Instance
from resplit.planner.outcome import OPTIMAL_GAP
from resplit.planner.relax import solve_from
from resplit.types import Node, Plan, Problem

__all__ = ["explain"]

GIB = 2**30
MAX_WHAT_IFS = 8
NEAR_CEILING = 0.02  # utilisation left below the ceiling; with less, the ceiling binds


def explain(problem: Problem, plan: Plan, time_limit_s: float = 5.0) -> str:
    """Describe `plan`: its chain, the parts of its latency, the binding limits and the gains from relaxing them.

    Solving the changed problems takes up to `time_limit_s` seconds in total.
    """
    head = f"{plan.status} ({plan.solver}, {plan.solve_s:.2f} s)"
    if plan.placement is None or plan.objective is None or plan.terms is None:
        return f"{head}: no plan\n  {plan.reason}\n"
    bound = f", bound {plan.lower_bound:.6g}, gap {plan.gap:.2%}" if plan.gap is not None else ""
    terms = f"latency {plan.terms.latency_s:.4g} s, balance {plan.terms.balance:.3f}, privacy {plan.terms.privacy:.3f}"
    terms += f", energy {plan.terms.energy_j:.4g} J per request" if plan.terms.energy_j > 0 else ""
    sections = [
        f"{head}: objective {plan.objective:.6g}{bound}\n  {terms}",
        "Chain\n" + "\n".join(_chain(problem, plan)),
        "Latency by class, in seconds\n" + "\n".join(_latency(problem, plan)),
        "Nodes\n" + "\n".join(_nodes(problem, plan)),
        "Gains from more resources (solved again)\n" + "\n".join(_gains(problem, plan, time_limit_s)),
    ]
    if plan.moved_bytes is not None:
        sections.append(f"Moves {plan.moved_bytes / GIB:.2f} GiB from the current placement")
    return "\n\n".join(sections) + "\n"


def _chain(problem: Problem, plan: Plan) -> Iterator[str]:
    """The segments in model order, between the sources."""
    sources = ", ".join(dict.fromkeys(c.source for c in problem.classes))
    yield f"  [{sources}]"
    for segment in plan.segments:
        first, last = problem.blocks[segment.first].name, problem.blocks[segment.last].name
        blocks = first if segment.first == segment.last else f"{first} .. {last}"
        node = problem.nodes[problem.node_index(segment.node)]
        private = any(block.private for block in problem.blocks[segment.first : segment.last + 1])
        marks = [f"{plan.utilization[segment.node]:.0%} busy", "trusted" if node.trusted else "not trusted"]
        marks += ["holds private blocks"] if private else []
        yield "   |"
        yield f"   +-> {segment.node}: {blocks} ({segment.last - segment.first + 1} blocks; {', '.join(marks)})"
    yield "   |"
    yield f"  [{sources}]"


def _latency(problem: Problem, plan: Plan) -> Iterator[str]:
    evaluation = evaluate(problem, plan.placement or ())
    yield f"  {'class':16} {'compute':>9} {'queueing':>9} {'network':>9} {'total':>9} {'objective':>10}"
    parts = zip(problem.classes, evaluation.compute_s, evaluation.queueing_s, evaluation.network_s, strict=True)
    for c, compute, queueing, network in parts:
        total = compute + queueing + network
        goal = "-" if c.slo_s is None else f"{c.slo_s:.4g}"
        missed = f"  missed by {plan.slo_shortfall_s[c.name]:.4g}" if c.name in plan.slo_shortfall_s else ""
        yield f"  {c.name:16} {compute:9.4f} {queueing:9.4f} {network:9.4f} {total:9.4f} {goal:>10}{missed}"


def _nodes(problem: Problem, plan: Plan) -> Iterator[str]:
    used = _used_bytes(problem, plan)
    for node, used_bytes in zip(problem.nodes, used, strict=True):
        if used_bytes > 0:
            share = used_bytes / node.memory_bytes if node.memory_bytes else 1.0
            binds = _binding(problem, plan, node.name, used_bytes)
            yield (
                f"  {node.name:16} memory {used_bytes / GIB:7.2f} of {node.memory_bytes / GIB:7.2f} GiB ({share:.0%}), "
                f"utilization {plan.utilization[node.name]:.3f} of {node.max_utilization:.2f}"
                f"{_shared_passes_and_power(node, plan.utilization[node.name])}{binds}"
            )


def _shared_passes_and_power(node: Node, utilization: float) -> str:
    """The load share of a node whose sessions share passes, and the power that its load takes; "" if neither is set."""
    power_w = node.compute_w * (utilization - node.background_utilization)
    parts = [f"load share {node.load_share:.2g}"] if node.load_share < 1 else []
    parts += [f"{power_w:.3g} W above idle"] if node.compute_w > 0 else []
    return "".join(f", {part}" for part in parts)


def _binding(problem: Problem, plan: Plan, name: str, used_bytes: float) -> str:
    """A mark for the limits that bind on a node; "" if none does."""
    node = problem.nodes[problem.node_index(name)]
    binds = ["memory"] if node.memory_bytes - used_bytes < np.median(block_bytes(problem)) else []
    binds += ["ceiling"] if node.max_utilization - plan.utilization[name] < NEAR_CEILING else []
    return f"  <- {' and '.join(binds)} bind{'s' if len(binds) == 1 else ''}" if binds else ""


def _used_bytes(problem: Problem, plan: Plan) -> np.ndarray:
    """Bytes of weights and reserved caches on each node (N,)."""
    index = [problem.node_index(name) for name in plan.placement or ()]
    return np.bincount(index, block_bytes(problem), len(problem.nodes))


def _gains(problem: Problem, plan: Plan, time_limit_s: float) -> Iterator[str]:
    """The gain of each changed problem. If no gain is shown, none was found in time."""
    what_ifs = list(_what_ifs(problem, plan))[:MAX_WHAT_IFS]
    if not what_ifs or plan.objective is None:
        yield "  nothing: no memory, trust or ceiling limits this plan"
        return
    for what, changed in what_ifs:
        instance, budget = Instance.of(changed), Budget(time_limit_s / len(what_ifs))
        start = instance.nodes_of(plan.placement or ())
        outcome, _ = solve_from(instance, budget, start, OPTIMAL_GAP)
        cost = plan.objective if outcome.nodes_of is None else min(plan.objective, instance.cost(outcome.nodes_of))
        gain = plan.objective - cost
        yield f"  {what}: {f'-{gain:.4g} ({gain / plan.objective:.2%})' if gain > 1e-9 * cost else 'nothing'}"


def _what_ifs(problem: Problem, plan: Plan) -> Iterator[tuple[str, Problem]]:
    """Changed problems: 1 GiB more on each full node, a higher ceiling on each busy node, trust in each other node."""
    used = _used_bytes(problem, plan)
    for i, node in enumerate(problem.nodes):
        binds = _binding(problem, plan, node.name, used[i]) if used[i] > 0 else ""
        if "memory" in binds:
            changed = replace(node, memory_bytes=node.memory_bytes + GIB)
            yield f"1 GiB more on {node.name}", _with_node(problem, i, changed)
        if "ceiling" in binds:
            changed = replace(node, max_utilization=min(0.99, node.max_utilization + 0.1))
            yield f"a ceiling of {changed.max_utilization:.2f} on {node.name}", _with_node(problem, i, changed)
    if any(block.private for block in problem.blocks) or problem.weights.privacy > 0:
        times = np.nanmean(problem.decode_s_per_token + problem.prefill_s_per_token, axis=0)
        for i in np.argsort(times, kind="stable"):
            if not problem.nodes[i].trusted:
                changed = replace(problem.nodes[i], trusted=True)
                yield f"trust in {changed.name}", _with_node(problem, int(i), changed)


def _with_node(problem: Problem, i: int, node: Node) -> Problem:
    return replace(problem, nodes=(*problem.nodes[:i], node, *problem.nodes[i + 1 :]))
