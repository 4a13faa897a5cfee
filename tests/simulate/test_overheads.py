"""What the processes of a cluster add, in simulated time."""

from dataclasses import replace

import numpy as np
import pytest

from resplit.config import LinkShape
from resplit.session_records import SessionRecord
from resplit.simulate.agenda import Agenda
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.overheads import NO_OVERHEADS, Overheads
from resplit.simulate.replication import Replication
from resplit.simulate.sessions import SimulatedRoute, SimulatedSession
from resplit.workload import Arrival
from tests.support.networks import hardware, layer, open_cluster

NODES = ["home", "far", "spare"]
LINK = LinkShape.model_validate({"latency": "0 ms", "bandwidth": "8 Mbit/s"})
BYTES_PER_S, KV_BYTES, POSITIONS, LAYER_S, TOKENS = 1e6, 2048.0, 16, 0.01, 8
FEATURES = [replace(layer(index), kv_bytes_per_token=KV_BYTES) for index in range(2)]


def served(overheads: Overheads) -> SessionRecord:
    """One request over two nodes, between which messages take no time."""
    agenda = Agenda()
    machines = {
        name: Machine(name, hardware(0.0, LAYER_S), ["layer"] * 2, agenda, batch_s=overheads.batch_s) for name in NODES
    }
    network = SimulatedNetwork(lambda *_: None, np.random.default_rng(0))
    gateway = SimulatedGateway(open_cluster(NODES), FEATURES, machines, network, agenda, overheads=overheads)
    gateway.activate(SimulatedRoute.of(1, NODES[:2], machines, FEATURES, NODES, 4.0))
    agenda.at(0.0, gateway.arrive, Arrival(0.0, "any", 1, TOKENS), "one")
    agenda.run()
    return gateway.records[0]


def test_a_request_takes_longer_by_what_the_gateway_and_its_batches_add() -> None:
    plain = served(NO_OVERHEADS)
    assert plain.end_s == pytest.approx(2 * TOKENS * LAYER_S)
    added = served(Overheads(request_s=0.1, token_s=0.02, batch_s=0.003))
    assert added.end_s - plain.end_s == pytest.approx(0.1 + (TOKENS - 1) * 0.02 + 2 * TOKENS * 0.003)
    assert added.waited_s - plain.waited_s == pytest.approx(2 * TOKENS * 0.003)  # a batch begins later
    assert added.computed_s == pytest.approx(plain.computed_s)


def replicated(are_sent: bool) -> tuple[Replication, SimulatedSession, SimulatedNetwork, Agenda]:
    """A session of which as many positions were cached as are replicated together."""
    agenda = Agenda()
    machines = {name: Machine(name, hardware(0.0, LAYER_S), ["layer"] * 2, agenda) for name in NODES}
    network = SimulatedNetwork(lambda *_: LINK, np.random.default_rng(0), in_parts=are_sent)
    cluster = open_cluster(NODES).model_copy(update={"kv_tokens": 100})
    replication = Replication(cluster, FEATURES, machines, network, agenda, are_sent)
    session = SimulatedSession("one", Arrival(0.0, "any", POSITIONS, TOKENS), position=POSITIONS)
    session.enter(SimulatedRoute.of(1, ["far", "far"], machines, FEATURES, NODES, 4.0))
    return replication, session, network, agenda


def test_replicas_take_bandwidth_and_hold_nothing_before_they_have_arrived() -> None:
    replication, session, network, agenda = replicated(are_sent=True)
    replication.advance(session)
    sent_bytes = 2 * POSITIONS * KV_BYTES
    ((_, stand_by), _), *others = session.copying
    assert not others
    assert stand_by != "far"
    assert network.due_s("far", stand_by, 0.0, 0.001) == pytest.approx(sent_bytes / BYTES_PER_S)
    agenda.run(until_s=0.0)
    replication.advance(session)
    assert session.replica == 0
    agenda.at(sent_bytes / BYTES_PER_S + 1e-6, replication.advance, session)
    agenda.run()
    assert session.replica == POSITIONS


def test_only_the_positions_since_the_last_replica_are_sent() -> None:
    replication, session, network, agenda = replicated(are_sent=True)
    replication.advance(session)
    agenda.at(1.0, lambda: None)
    agenda.run()
    session.position += POSITIONS + 1
    replication.advance(session)
    [(pair, transfer)] = session.copying
    assert transfer.left_bytes == 2 * (POSITIONS + 1) * KV_BYTES
    session.stop_copying()  # as at its end, or when it moves
    assert network.due_s(*pair, 0.0, 2.0) == 2.0


def test_replicas_that_are_not_sent_are_there_at_once() -> None:
    replication, session, network, _ = replicated(are_sent=False)
    replication.advance(session)
    assert (session.replica, session.copying) == (POSITIONS, [])
    assert network.due_s("far", "spare", 0.0, 0.0) == 0.0
