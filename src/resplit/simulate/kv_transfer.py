"""KV transfers in simulated time: which caches follow a session to another route, and when they have arrived."""

from __future__ import annotations

from collections.abc import Sequence

from resplit.simulate.agenda import Agenda
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedPreCopy, SimulatedRoute, SimulatedSession
from resplit.types import BlockFeatures

__all__ = ["SimulatedKvTransfer"]


class SimulatedKvTransfer:
    """Transfers caches between the nodes of one cluster, whose gateway is on the node `source`."""

    def __init__(
        self, source: str, features: Sequence[BlockFeatures], network: SimulatedNetwork, agenda: Agenda
    ) -> None:
        self._source = source
        self._features = features
        self._network = network
        self._agenda = agenda

    def begin(self, session: SimulatedSession, target: SimulatedRoute) -> SimulatedPreCopy:
        """Begin to pre-copy all positions of a session to `target`."""
        return self._round(session, target, 0, 0.0)

    def again(self, session: SimulatedSession, copy: SimulatedPreCopy) -> SimulatedPreCopy:
        """Begin another round of pre-copying: the positions that were added during the last one."""
        return self._round(session, copy.target, copy.last, copy.cache_bytes)

    def _round(
        self, session: SimulatedSession, target: SimulatedRoute, first: int, sent_bytes: float
    ) -> SimulatedPreCopy:
        more_bytes, done_s = self.send(session, target, session.position - first, background=True)
        return SimulatedPreCopy(target, first, session.position, sent_bytes + more_bytes, done_s)

    def send(
        self, session: SimulatedSession, target: SimulatedRoute, positions: int, background: bool = False
    ) -> tuple[float, float]:
        """Send this many positions of the caches that move. Returns their bytes, and when they arrive.

        The gateway tells the old nodes to send, and is told when that is done: a round trip of messages.
        """
        assert session.route is not None
        now_s, source, sent = self._agenda.now_s, self._source, 0.0
        done_s = now_s
        bytes_by_pair: dict[tuple[str, str], float] = {}
        for feature, old, new in zip(self._features, session.route.placement, target.placement, strict=True):
            if old != new and feature.kv_bytes_per_token > 0:
                size = feature.kv_bytes_per_token * positions
                bytes_by_pair[old, new] = bytes_by_pair.get((old, new), 0.0) + size
        send = self._network.background_due_s if background else self._network.due_s
        for (old, new), size in bytes_by_pair.items():
            told_s = now_s + self._network.seconds(source, old, 0.0, now_s)
            arrived_s = send(old, new, size, told_s)
            done_s = max(done_s, arrived_s + self._network.seconds(old, source, 0.0, now_s))
            sent += size
        return sent, done_s
