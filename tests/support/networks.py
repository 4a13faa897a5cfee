"""Queueing networks of simulated machines, without links, limits or changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from resplit.config import ClusterConfig
from resplit.node.emulation import Hardware
from resplit.simulate.agenda import Agenda
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedRoute
from resplit.types import BlockFeatures
from resplit.workload import Arrival


def layer(index: int) -> BlockFeatures:
    return BlockFeatures(f"layer.{index}", "layer", 0, 0.0, 0.0, 0.0, 0.0, 0.0, False, 0.0)


def hardware(fixed_s: float, session_s: float, token_s: float = 0.0) -> Hardware:
    """A step of a layer takes `fixed_s` + n `session_s` for n sessions, and a token of a prompt `token_s` more."""
    nothing = dict.fromkeys(("embed", "layer", "head"), 0.0)
    return Hardware({**nothing, "layer": fixed_s}, {**nothing, "layer": session_s}, {**nothing, "layer": token_s})


def open_cluster(nodes: Sequence[str]) -> ClusterConfig:
    """A cluster in which nothing but the nodes takes time, and no request is refused."""
    return ClusterConfig.model_validate(
        {
            "name": "network",
            "source": nodes[0],
            "nodes": [{"name": name, "memory": "1 GiB"} for name in nodes],
            "trusted": list(nodes),
            "classes": [{"name": "any", "rate_rps": 1.0, "prompt_tokens": 1, "new_tokens": 1}],
            "kv_tokens": 10**9,
            "limits": {"context_tokens": 10**6, "sessions": 10**6, "queue": 10**6, "deadline": "1000000 s"},
        }
    )


def latencies(
    machines: Sequence[Hardware],
    arrivals: Iterator[Arrival],
    requests: int,
    service: Callable[[float], float] | None = None,
) -> list[tuple[int, float]]:
    """Serve `requests` requests on a chain with one layer on each machine; returns tokens and latency of each."""
    names = [f"node-{index}" for index in range(len(machines))]
    cluster, agenda, features = open_cluster(names), Agenda(), [layer(index) for index in range(len(machines))]
    built = {
        name: Machine(name, each, ["layer"] * len(machines), agenda, service)
        for name, each in zip(names, machines, strict=True)
    }
    gateway = SimulatedGateway(
        cluster, features, built, SimulatedNetwork(cluster.link, np.random.default_rng(0)), agenda
    )
    gateway.activate(SimulatedRoute.of(1, names, built, features, names, 4.0))

    def arrive(number: int) -> None:
        arrival = next(arrivals)
        agenda.at(arrival.at_s, arrived, arrival, number)

    def arrived(arrival: Arrival, number: int) -> None:
        gateway.arrive(arrival, str(number))
        if number + 1 < requests:
            arrive(number + 1)

    arrive(0)
    agenda.run()
    return [(each.new_tokens, each.token_times_s[-1] - each.arrival_s) for each in gateway.records]


def poisson(
    rate_rps: float, tokens: Callable[[np.random.Generator], int], seed: int, prompt_tokens: int = 1
) -> Iterator[Arrival]:
    """Requests that arrive as a Poisson process, with so many new tokens."""
    rng, at_s = np.random.default_rng(seed), 0.0
    while True:
        at_s += rng.exponential(1 / rate_rps)
        yield Arrival(at_s, "any", prompt_tokens, tokens(rng))
