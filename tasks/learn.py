"""Learn: try both arms of the bandit in the simulator, and fit its models to the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from sklearn.linear_model import Ridge

from resplit.policies import Policy
from resplit.policies.learned import ARMS, FEATURES, Bandit, Learned, Rewarded, rewards_of
from resplit.simulate.run import simulate
from resplit.simulate.world import World

__all__ = ["fit_bandit", "try_arms"]

_WORK_LIMIT = 300  # solver steps of a plan: many choices between fair plans teach more than few between the best
_NOBODY = Bandit(((0.0,) * len(FEATURES),) * len(ARMS), (0.0,) * len(ARMS))


@task(cache_policy=NO_CACHE, task_run_name="{scenario} {seed}")
def try_arms(scenario: Path, seed: int) -> list[Rewarded]:
    """Simulate a scenario in which each choice is a coin's; returns all choices with their rewards."""
    world, policy = World.load(scenario), Learned(_NOBODY, explore=1.0)
    loop = world.loop()
    loop = replace(loop, settings=replace(loop.settings, work_limit=_WORK_LIMIT))
    record = simulate(
        world.cluster, world.features, world.scenario, world.arrivals(seed), cast(Policy, policy),
        name="learned", seed=seed, loop=loop,
    )  # fmt: skip
    return rewards_of(record, policy.pulls)


def fit_bandit(rewarded: Sequence[Rewarded]) -> Bandit:
    """A ridge regression for each arm. ValueError if an arm was never tried."""
    models = [
        Ridge(alpha=1.0).fit(*_rows([each for each in rewarded if each.pull.arm == arm])) for arm in range(len(ARMS))
    ]
    weights = tuple(tuple(round(float(value), 4) for value in model.coef_) for model in models)
    return Bandit(weights, tuple(round(float(model.intercept_), 4) for model in models))


def _rows(rewarded: Sequence[Rewarded]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([each.pull.context for each in rewarded]), np.array([each.reward for each in rewarded])
