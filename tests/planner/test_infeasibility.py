"""The reasons why a problem has no placement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given

from resplit.planner.infeasibility import infeasibility
from resplit.planner.instance import Instance
from tests.support.problems import best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples


@given(seeds())
@examples(60)
def test_a_feasible_problem_has_no_reason(seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    random = np.random.default_rng(seed)
    need = sum(block.weight_bytes + block.kv_bytes_per_token * problem.kv_tokens for block in problem.blocks)
    share = random.dirichlet(np.ones(3)) * random.uniform(1.0, 1.5)
    nodes = tuple(replace(n, memory_bytes=float(need * s)) for n, s in zip(problem.nodes, share, strict=True))
    problem = replace(problem, nodes=nodes)

    if infeasibility(Instance.of(problem)):
        assert best_by_enumeration(problem)[1] is None


def test_blocks_that_fit_only_if_they_are_divided_lack_memory() -> None:
    problem = tiny_problem(12, blocks=4)
    sizes, rooms = [3e9, 3e9, 2e9, 2e9], [5.5e9, 4.5e9, 1e9]
    problem = replace(
        problem,
        kv_tokens=0.0,
        blocks=tuple(
            replace(b, private=False, weight_bytes=size) for b, size in zip(problem.blocks, sizes, strict=True)
        ),
        nodes=tuple(replace(n, memory_bytes=room) for n, room in zip(problem.nodes, rooms, strict=True)),
        classes=tuple(replace(c, rate_rps=0.01) for c in problem.classes),
        prefill_s_per_token=np.full((4, 3), 1e-3),
        decode_s_per_token=np.full((4, 3), 1e-3),
    )

    reason = infeasibility(Instance.of(problem))

    assert reason is not None
    assert reason.startswith("memory")
    assert "short by" in reason
