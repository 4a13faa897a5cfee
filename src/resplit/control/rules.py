"""The rules for a placement: it covers the model, and private blocks are on trusted nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resplit.config import ClusterConfig
from resplit.model.source import StoredModel
from resplit.privacy import privacy_violation
from resplit.types import BlockFeatures


@dataclass(frozen=True)
class PlacementRules:
    """The current rules. Nodes that are `drained` may run no block."""

    cluster: ClusterConfig
    features: tuple[BlockFeatures, ...]
    drained: frozenset[str] = frozenset()

    @classmethod
    def of(cls, cluster: ClusterConfig, model: StoredModel, drained: frozenset[str] = frozenset()) -> PlacementRules:
        """The rules for a model on a cluster."""
        return cls(cluster, model.features(cluster.private_layers), drained)

    @property
    def private(self) -> frozenset[int]:
        """Indices of the private blocks."""
        return frozenset(index for index, block in enumerate(self.features) if block.private)

    def violation(self, placement: Sequence[str]) -> str | None:
        """The rule that a placement violates, in words; None if it keeps all rules."""
        if len(placement) != len(self.features):
            return f"{len(placement)} blocks placed, the model has {len(self.features)}"
        known = set(self.cluster.node_names)
        for block, node in zip(self.features, placement, strict=True):
            if node not in known:
                return f"block {block.name}: no node is called {node!r}"
            if node in self.drained:
                return f"block {block.name}: {node} is drained; `resplit join {node}` lets it serve again"
        return self.privacy_violation(placement)

    def privacy_violation(self, placement: Sequence[str]) -> str | None:
        """The private block that a placement puts on a node that is not trusted, in words; None if there is none."""
        return privacy_violation(placement, self.features, self.cluster.trusted)
