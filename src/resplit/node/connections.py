"""A node's connections to the other nodes, and the emulated links that delay their messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from resplit.config import ClusterConfig
from resplit.errors import DataError
from resplit.security.identity import Member
from resplit.wire.addresses import Address
from resplit.wire.emulated_link import EmulatedLink, Shape
from resplit.wire.node_pb2 import Step
from resplit.wire.peers import Peer
from resplit.wire.step_stream import Crossing


class Connections:
    """The links and peers of the node `name`. `member` holds its credentials.

    `on_crossing` is called for each step that a peer acknowledged, `on_lost` with the steps that a broken connection
    left unacknowledged. Both must be set before `connect`.
    """

    def __init__(self, name: str, cluster: ClusterConfig, member: Member) -> None:
        self.links = {other: _declared_link(cluster, name, other) for other in cluster.node_names if other != name}
        self.peers: dict[str, Peer] = {}
        self.on_crossing: Callable[[Crossing], None] = lambda crossing: None
        self.on_lost: Callable[[str, list[Step]], None] = lambda peer, steps: None
        self._name = name
        self._source = cluster.source
        self._member = member

    @property
    def link_to_gateway(self) -> EmulatedLink:
        """The link to the gateway, which runs on the source node."""
        return self.links.get(self._source) or EmulatedLink()

    def connect(self, addresses: Mapping[str, Address], shapes: Mapping[str, Shape] | None = None) -> None:
        """Set where the other nodes listen; a changed address makes a new connection.

        `shapes` are the emulated links to nodes that were added to the cluster after this one started.
        """
        for name, address in addresses.items():
            known = self.peers.get(name)
            if name != self._name and (known is None or known.address != address):
                link = self.links.setdefault(name, EmulatedLink((shapes or {}).get(name)))
                self.peers[name] = Peer(name, address, self._member, link, self.on_crossing, self.on_lost)

    async def forget_except(self, names: Collection[str]) -> None:
        """Close the connections to all other nodes: they have left the cluster."""
        gone = [self.peers.pop(name) for name in self.peers.keys() - names]
        await asyncio.gather(*(peer.disconnect() for peer in gone))

    def peer(self, name: str) -> Peer:
        """The connection to the node `name`; DataError if its address is not known."""
        if name not in self.peers:
            raise DataError(f"{self._name} has no address of node {name!r}; the controller must connect them first")
        return self.peers[name]

    def set_links(self, links: Mapping[str, Shape]) -> None:
        """Change emulated links, by the name of the node at the other end."""
        for name, shape in links.items():
            self.links[name].shape = shape

    async def disconnect(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(peer.disconnect() for peer in self.peers.values()))


def _declared_link(cluster: ClusterConfig, name: str, other: str) -> EmulatedLink:
    shape = cluster.link(name, other)
    return EmulatedLink(Shape(shape.latency, shape.bandwidth) if shape else None)
