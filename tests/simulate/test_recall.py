"""Passes that wait at a slowed node are given back and take the new route, whenever that happens. No token is lost."""

import numpy as np
import pytest

from resplit.config import LinkShape
from resplit.session_records import SessionRecord
from resplit.simulate.agenda import Agenda
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedRoute
from resplit.workload import Arrival
from tests.support.networks import hardware, layer, open_cluster

NODES = ["home", "far"]
LINK = LinkShape.model_validate({"latency": "5 ms", "bandwidth": "1 Gbit/s"})
SLOW_S, FAST_S, TOKENS, REQUESTS = 0.05, 0.001, 12, 6


def served(placement: list[str], moved_s: float, recall: bool, staged: bool = False) -> list[SessionRecord]:
    """Requests that arrive together at the slow node `far`, of whose blocks none is there from `moved_s` on."""
    agenda, features = Agenda(), [layer(0), layer(1)]
    speeds = {"home": FAST_S, "far": SLOW_S}
    machines = {name: Machine(name, hardware(0.0, speeds[name]), ["layer", "layer"], agenda) for name in NODES}
    network = SimulatedNetwork(lambda one, other: None if one == other else LINK, np.random.default_rng(0))
    gateway = SimulatedGateway(open_cluster(NODES), features, machines, network, agenda)
    old, new = (
        SimulatedRoute.of(epoch, nodes, machines, features, NODES, 4.0)
        for epoch, nodes in ((1, placement), (2, ["home", "home"]))
    )
    gateway.activate(old)

    def move() -> None:
        if staged:
            gateway.pause(lambda: agenda.at(gateway.move_all(new), resume))
            return
        gateway.activate(new)
        if recall:
            gateway.recall({"far"}, 2)

    def resume() -> None:
        gateway.activate(new)
        gateway.unpause()

    for number in range(REQUESTS):
        agenda.at(0.0, gateway.arrive, Arrival(0.0, "any", 4, TOKENS), str(number))
    agenda.at(moved_s, move)
    agenda.run()
    assert not gateway.busy
    return gateway.records


@pytest.mark.parametrize("placement", [["far", "far"], ["home", "far"], ["far", "home"]])
@pytest.mark.parametrize("moved_s", np.linspace(0.02, 1.5, 15).round(3).tolist())
@pytest.mark.parametrize("staged", [False, True])
def test_all_tokens_come_whenever_passes_are_given_back(placement: list[str], moved_s: float, staged: bool) -> None:
    records = served(placement, moved_s, recall=True, staged=staged)
    assert len(records) == REQUESTS
    assert all(record.status == 200 and record.new_tokens == TOKENS for record in records)
    assert all(np.diff(record.token_times_s).min() > 0 for record in records)
    assert any(2 in record.epochs for record in records)


def test_requests_that_wait_at_a_slow_node_end_sooner_if_their_passes_are_given_back() -> None:
    kept, recalled = (served(["far", "far"], 0.12, recall=each) for each in (False, True))
    assert max(each.end_s for each in recalled) < max(each.end_s for each in kept)
