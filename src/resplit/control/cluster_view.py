"""The cluster as the controller sees it now: its configuration, its rules, and which nodes answer."""

from __future__ import annotations

from resplit.config import ClusterConfig
from resplit.control.gateway import Gateway
from resplit.control.rules import PlacementRules
from resplit.model.source import StoredModel
from resplit.wire.addresses import Address


class ClusterView:
    """One cluster. `addresses` has every node that commands go to, in file order.

    While nodes are being removed or moved, `addresses` still has them, so that they can hand over caches.
    """

    def __init__(
        self, cluster: ClusterConfig, model: StoredModel, addresses: dict[str, Address], gateway: Gateway
    ) -> None:
        self.cluster = cluster
        self.model = model
        self.addresses = addresses
        self.gateway = gateway
        self.rules = PlacementRules.of(cluster, model)

    def adopt(self, cluster: ClusterConfig, drained: frozenset[str], addresses: dict[str, Address]) -> None:
        """Replace the configuration. The live epoch does not change, and may violate the new rules."""
        self.cluster, self.addresses = cluster, addresses
        self.rules = PlacementRules.of(cluster, self.model, drained)
        self.gateway.reconfigure(cluster, self.rules.features, drained)

    @property
    def reachable(self) -> list[str]:
        """The nodes that answer, in file order."""
        connected = self.gateway.connected_nodes()
        return [name for name in self.addresses if name in connected]

    @property
    def unreachable(self) -> list[str]:
        """The nodes that do not answer, sorted."""
        return sorted(set(self.addresses) - self.gateway.connected_nodes())

    def lost_from(self, placement: tuple[str, ...]) -> list[str]:
        """The nodes of a placement that do not answer, sorted."""
        return sorted(set(placement) - self.gateway.connected_nodes())
