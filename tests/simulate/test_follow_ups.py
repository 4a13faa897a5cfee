"""Follow-up passes in simulated time: the node of the head begins them, so that a token waits for no link."""

import numpy as np
import pytest

from resplit.config import LinkShape
from resplit.pass_times import PassTime
from resplit.session_records import SessionRecord
from resplit.simulate.agenda import Agenda
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedRoute
from resplit.workload import Arrival
from tests.support.networks import hardware, layer, open_cluster

NODES = ["home", "far"]
LINK = LinkShape.model_validate({"latency": "20 ms", "bandwidth": "1000 Gbit/s"})
LINK_S, LAYER_S, TOKENS = 0.02, 0.001, 200
LATER_S = 0.2


def served(placement: list[str], later: list[str] | None = None) -> tuple[SessionRecord, list[PassTime]]:
    """One request at the gateway `home`. The placement `later` becomes live at `LATER_S`."""
    agenda, features, passes = Agenda(), [layer(0), layer(1)], list[PassTime]()
    machines = {name: Machine(name, hardware(0.0, LAYER_S), ["layer", "layer"], agenda) for name in NODES}
    network = SimulatedNetwork(lambda one, other: None if one == other else LINK, np.random.default_rng(0))
    gateway = SimulatedGateway(open_cluster(NODES), features, machines, network, agenda)
    gateway.passes.on_pass = passes.append
    for at_s, nodes in ((0.0, placement), (LATER_S, later)):
        if nodes:
            epoch = 1 if nodes is placement else 2
            agenda.at(at_s, gateway.activate, SimulatedRoute.of(epoch, nodes, machines, features, NODES, 4.0))
    agenda.at(0.0, gateway.arrive, Arrival(0.0, "any", 1, TOKENS), "one")
    agenda.run()
    assert not gateway.busy
    return gateway.records[0], passes


def test_tokens_come_in_the_pace_of_the_node_where_it_has_both_ends() -> None:
    record, passes = served(["far", "far"])
    assert len(record.token_times_s) == TOKENS
    assert [done.followed for done in passes[:4]] == [False, False, False, True]  # none before a pass was timed
    gaps_s = np.diff(record.token_times_s)
    assert gaps_s[0] == pytest.approx(2 * LINK_S + 2 * LAYER_S, abs=1e-6)
    assert np.median(gaps_s) == pytest.approx(2 * LAYER_S, abs=1e-6)
    assert all(done.total_s == pytest.approx(2 * LAYER_S, abs=1e-6) for done in passes if done.followed)
    assert [done.start for done in passes] == list(range(TOKENS))


def test_a_head_on_another_node_than_the_first_block_begins_nothing() -> None:
    record, passes = served(["home", "far"])
    assert not any(done.followed for done in passes)
    # The gateway is at home: there is no link to the first block.
    assert np.diff(record.token_times_s) == pytest.approx(2 * LINK_S + 2 * LAYER_S, abs=1e-6)


def test_a_session_leaves_its_route_although_passes_follow_one_another() -> None:
    record, passes = served(["far", "far"], later=["home", "far"])
    assert record.epochs == (1, 2)
    assert len(record.token_times_s) == TOKENS
    assert any(done.followed for done in passes if done.at_s < LATER_S)
    # The pass that was under way still comes; the node of the head begins none after it.
    assert not any(done.followed for done in passes if done.at_s > LATER_S + 2 * LAYER_S + LINK_S)
