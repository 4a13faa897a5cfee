"""Training of the bandit: the better arm is found, on scenarios that are not those of the study."""

from __future__ import annotations

import numpy as np

from flows.params import load_params
from resplit.policies.learned import FEATURES, Pull, Rewarded
from tasks.learn import fit_bandit


def pull(at_s: float, arm: int, first: float = 0.0) -> Pull:
    return Pull(at_s, (first, *(0.0,) * (len(FEATURES) - 1)), arm)


def test_the_fit_finds_in_which_context_which_arm_is_better() -> None:
    rng, rewarded = np.random.default_rng(0), []
    for _ in range(200):
        context, arm = float(rng.uniform(-1, 1)), int(rng.integers(2))
        reward = (context if arm else -context) + float(rng.normal(0, 0.1))
        rewarded.append(Rewarded(pull(0.0, arm, context), reward))
    bandit = fit_bandit(rewarded)
    assert (bandit.best_arm(pull(0.0, 0, 0.5).context), bandit.best_arm(pull(0.0, 0, -0.5).context)) == (1, 0)


def test_it_is_not_trained_on_what_it_is_judged_on() -> None:
    params = load_params()
    assert not set(params.learned.scenarios) & set(params.simulated.scenarios)
    trained = range(params.learned.first_seed, params.learned.first_seed + params.learned.seeds)
    assert params.simulated.first_seed + params.simulated.seeds <= trained.start
