"""Policies: when to move blocks, and where to. Siblings with one interface, for clusters and for the simulator.

Pure: state, time and randomness are handed in. A policy does not see whether its cluster is real.
"""

from __future__ import annotations

from importlib import import_module

from resplit.errors import ConfigError
from resplit.policies.base import Occasion, Policy, Situation

__all__ = ["ABLATIONS", "POLICIES", "Occasion", "Policy", "Situation", "make_policy"]

POLICIES = {
    "static": "resplit.policies.static:Static",
    "threshold": "resplit.policies.threshold:Threshold",
    "resplit": "resplit.policies.orchestrator:Orchestrator",
    "clairvoyant": "resplit.policies.clairvoyant:Clairvoyant",
    "static-uniform": "resplit.policies.planned:StaticUniform",
    "memory": "resplit.policies.planned:MemoryShares",
    "latency-dp": "resplit.policies.planned:LatencyDp",
    "swarm": "resplit.policies.planned:Swarm",
    "greedy": "resplit.policies.planned:Greedy",
    "balance": "resplit.policies.balance:Balance",
    "learned": "resplit.policies.learned:Learned",
}
# `resplit` without one of its parts, for studies.
ABLATIONS = {
    "resplit-without-fast-loop": "resplit.policies.ablations:WithoutFastLoop",
    "resplit-without-forecast": "resplit.policies.ablations:WithoutForecast",
    "resplit-without-hysteresis": "resplit.policies.ablations:WithoutHysteresis",
    "resplit-without-kv-transfer": "resplit.policies.ablations:WithoutKvTransfer",
    "resplit-without-queueing": "resplit.policies.ablations:WithoutQueueing",
    "resplit-without-standby": "resplit.policies.ablations:WithoutStandby",
}


def make_policy(name: str) -> Policy:
    """A policy for one run: of `POLICIES`, of `ABLATIONS`, or `package.module:Name`, called without arguments.

    ConfigError if there is no such policy, or if the name makes something else.
    """
    module, _, attribute = (POLICIES | ABLATIONS).get(name, name).partition(":")
    if not attribute:
        raise ConfigError("policy", f"{name!r} is not one of {', '.join(POLICIES)}, nor a package.module:Name")
    try:
        policy = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError("policy", f"{name!r} cannot be made: {error}") from None
    if not isinstance(policy, Policy):
        raise ConfigError("policy", f"{name!r} has no `asked` or no `decide`; see resplit.policies.base.Policy")
    return policy
