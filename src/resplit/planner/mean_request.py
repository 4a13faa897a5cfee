"""What the mean request of a problem takes on each node and on each link, without load: the sizes that plans weigh."""

from __future__ import annotations

import numpy as np

from resplit.types import FloatArray, Problem

__all__ = ["block_seconds", "link_seconds"]


def block_seconds(problem: Problem) -> FloatArray:
    """Seconds of each block on each node (J, N); NaN where a node cannot run a block."""
    prompt_tokens, new_tokens = _tokens(problem)
    seconds: FloatArray = prompt_tokens * problem.prefill_s_per_token + new_tokens * problem.decode_s_per_token
    return seconds


def link_seconds(problem: Problem) -> FloatArray:
    """Seconds of the activations of one hop from row to column (N, N); NaN where there is no link."""
    prompt_tokens, new_tokens = _tokens(problem)
    size_bytes = (prompt_tokens + new_tokens) * float(
        np.median([block.activation_bytes_per_token for block in problem.blocks])
    )
    seconds: FloatArray = new_tokens * problem.link_latency_s + size_bytes / problem.link_bandwidth_bytes_per_s
    return seconds


def _tokens(problem: Problem) -> tuple[float, float]:
    """Prompt tokens and new tokens of a request, as means over the classes by their rates."""
    rates = np.array([each.rate_rps for each in problem.classes])
    weights = rates if rates.any() else None
    prompts, new = ([c.prompt_tokens for c in problem.classes], [c.new_tokens for c in problem.classes])
    return float(np.average(prompts, weights=weights)), float(np.average(new, weights=weights))
