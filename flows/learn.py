"""Train the policy `learned` in the simulator: `python -m flows.learn`."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import sys
from collections.abc import Sequence

from prefect import flow

from flows.command import run_command
from flows.params import SCENARIOS, load_params
from resplit.policies.learned import Bandit
from tasks.learn import fit_bandit, try_arms

__all__ = ["learn"]


@flow(name="learn", validate_parameters=False)
def learn(scenarios: Sequence[str], seeds: Sequence[int]) -> Bandit:
    """The bandit of all choices that were tried in these scenarios with these seeds."""
    return fit_bandit(
        [each for name in scenarios for seed in seeds for each in try_arms(SCENARIOS / f"{name}.yaml", seed)]
    )


def main() -> None:
    """`python -m flows.learn`: train as `params.yaml` says, and keep the models in the package."""

    def run() -> None:
        params = load_params().learned
        bandit = learn(params.scenarios, range(params.first_seed, params.first_seed + params.seeds))
        bandit.save()
        sys.stdout.write(f"{bandit}\n")

    run_command(run)


if __name__ == "__main__":
    main()
