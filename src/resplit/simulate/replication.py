"""KV replicas in simulated time: copies of the caches of running sessions on stand-by nodes.

Where they are sent, they take bandwidth from messages. Else they are there at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from resplit.config import ClusterConfig
from resplit.gateway.sessions.kv_replication import choose_stand_bys
from resplit.simulate.agenda import Agenda
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedRoute, SimulatedSession
from resplit.types import BlockFeatures

__all__ = ["Replication"]


class Replication:
    """The replicas of all sessions. `are_sent`: they cross links; else they are there at once."""

    def __init__(
        self,
        cluster: ClusterConfig,
        features: Sequence[BlockFeatures],
        machines: Mapping[str, Machine],
        network: SimulatedNetwork,
        agenda: Agenda,
        are_sent: bool,
    ) -> None:
        self._cluster, self._features, self._machines = cluster, features, machines
        self._network, self._agenda, self._are_sent = network, agenda, are_sent
        self._stand_bys: dict[int, dict[int, str]] = {}  # by epoch: the node of each block's replica

    def advance(self, session: SimulatedSession) -> None:
        """After a pass: begin a copy if `copy_every` positions were added, and none is under way."""
        every, now_s = self._cluster.limits.copy_every, self._agenda.now_s
        if session.copying:
            if not all(self._network.has_arrived(*pair, transfer, now_s) for pair, transfer in session.copying):
                return
            session.replica, session.copying = session.copied_to, []
        if not every or session.position - session.replica < every:
            return
        if not self._are_sent:
            session.replica = session.position
        elif session.precopy is None and session.route is not None:
            sent_bytes = self._sent_bytes(session, session.route)
            session.copied_to = session.position
            session.copying = [
                (pair, self._network.send_in_background(*pair, size, now_s)) for pair, size in sent_bytes.items()
            ]

    def _sent_bytes(self, session: SimulatedSession, route: SimulatedRoute) -> dict[tuple[str, str], float]:
        """What nodes send to stand-by nodes, so that these hold the caches of a session up to its position."""
        chosen, sent_bytes = self._chosen(route), defaultdict[tuple[str, str], float](float)
        for block, node in chosen.items():
            held = session.replica if session.stand_bys.get(block) == node else 0
            size = self._features[block].kv_bytes_per_token * (session.position - held)
            sent_bytes[route.placement[block], node] += size
        session.stand_bys = chosen
        return sent_bytes

    def _chosen(self, route: SimulatedRoute) -> dict[int, str]:
        """The stand-by node of each block, chosen as on a cluster when the first session of an epoch is copied."""
        if route.epoch not in self._stand_bys:
            up = [name for name, machine in self._machines.items() if machine.alive]
            self._stand_bys[route.epoch] = choose_stand_bys(self._cluster, self._features, route.placement, up, {})
        return self._stand_bys[route.epoch]
