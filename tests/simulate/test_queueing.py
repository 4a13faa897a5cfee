"""The machines are exact queues: against closed forms, and against the recursion of Lindley path by path."""

import itertools

import numpy as np
import pytest

from resplit.simulate.agenda import Agenda
from resplit.simulate.machines import Machine, Ran, Visit, segment_pass
from tests.support.networks import hardware, latencies, poisson


class Exponential:
    """Service times that vary as an exponential distribution does; `drawn` has the factors."""

    def __init__(self, seed: int) -> None:
        self.drawn: list[float] = []
        self._rng = np.random.default_rng(seed)

    def __call__(self, seconds: float) -> float:
        self.drawn.append(self._rng.exponential())
        return seconds * self.drawn[-1]


def test_a_pipeline_of_machines_is_lindleys_recursion_at_every_stage() -> None:
    services_s = (0.05, 0.04, 0.03)
    arrivals = list(itertools.islice(poisson(15.0, lambda rng: 1, 1), 500))
    served = latencies([hardware(0.0, each) for each in services_s], iter(arrivals), len(arrivals))
    leaves_s = np.array([arrival.at_s for arrival in arrivals])
    for service_s in services_s:
        free_s = 0.0
        for index, at_s in enumerate(leaves_s):
            leaves_s[index] = free_s = max(at_s, free_s) + service_s
    expected = leaves_s - [arrival.at_s for arrival in arrivals]
    assert [latency_s for _, latency_s in served] == pytest.approx(expected, abs=1e-9)


def kelly_network(
    routes: list[list[int]], means_s: list[float], rate_rps: float, customers: int, seed: int
) -> tuple[list[float], list[float], list[float]]:
    """Mean time in a network of machines and arrival rate of each route, and the mean service time of each machine.

    Customers arrive as a Poisson process and take a route at random. Rates and service times are those that were drawn.
    """
    rng, agenda = np.random.default_rng(seed), Agenda()
    services = [Exponential(seed + 1 + i) for i in range(len(means_s))]
    machines = [
        Machine(str(i), hardware(0.0, mean_s), ["layer"], agenda, service)
        for i, (mean_s, service) in enumerate(zip(means_s, services, strict=True))
    ]
    times_s: list[list[float]] = [[] for _ in routes]

    def visit(route: int, stage: int, arrived_s: float, number: int) -> None:
        if stage == len(routes[route]):
            times_s[route].append(agenda.now_s - arrived_s)
            return

        def ran(_: Visit, __: Ran) -> None:
            visit(route, stage + 1, arrived_s, number)

        machines[routes[route][stage]].arrive(Visit(segment_pass(str(number), 0, 0, 1, 1, 1), done_by=ran))

    at_s = 0.0
    for number in range(customers):
        at_s += rng.exponential(1 / rate_rps)
        agenda.at(at_s, visit, int(rng.integers(len(routes))), 0, at_s, number)
    agenda.run()
    drawn_s = [mean_s * float(np.mean(service.drawn)) for mean_s, service in zip(means_s, services, strict=True)]
    return [float(np.mean(each)) for each in times_s], [len(each) / at_s for each in times_s], drawn_s


@pytest.mark.parametrize(
    ("routes", "what"),
    [
        ([[0, 1, 2], [2, 0]], "pipelines that share machines"),
        ([[0, 1, 0, 1], [1]], "tokens that come back"),
        ([[0], [1]], "replicas"),
    ],
)
def test_a_kelly_network_is_within_one_percent_of_its_closed_form(routes: list[list[int]], what: str) -> None:
    means_s = [0.1, 0.06, 0.08][: 1 + max(max(route) for route in routes)]
    mean_s, rates_rps, means_s = kelly_network(routes, means_s, 2.0, 30_000, seed=5)
    loads = [
        sum(rate * route.count(i) for rate, route in zip(rates_rps, routes, strict=True)) * each_s
        for i, each_s in enumerate(means_s)
    ]
    expected = [sum(means_s[i] / (1 - loads[i]) for i in route) for route in routes]
    assert np.dot(rates_rps, mean_s) == pytest.approx(np.dot(rates_rps, expected), rel=0.01), what
    assert mean_s == pytest.approx(expected, rel=0.02), what  # one route alone has fewer customers, so more noise


def test_sessions_that_share_a_machine_share_it_as_a_processor_is_shared() -> None:
    token_s, rate_rps, mean_tokens = 0.01, 2.0, 20
    tokens = poisson(rate_rps, lambda rng: int(rng.geometric(1 / mean_tokens)), 3)
    served = np.array(latencies([hardware(1e-12, token_s)], tokens, 10_000))
    service_s = served[:, 0].mean() * token_s
    assert served[:, 1].mean() == pytest.approx(service_s / (1 - rate_rps * service_s), rel=0.01)  # M/M/1-PS
    for few, many in ((5, 15), (25, 60)):  # a request of x seconds takes x / (1 - load), whatever the others need
        some = served[(served[:, 0] >= few) & (served[:, 0] <= many)]
        assert some[:, 1].mean() == pytest.approx(some[:, 0].mean() * token_s / (1 - rate_rps * service_s), rel=0.02)
