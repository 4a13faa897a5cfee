"""The way of a pass through an epoch's placement: segments in order, and where their nodes listen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resplit.types import Segment, segments_of
from resplit.wire.peers import Address


@dataclass(frozen=True)
class Route:
    """One epoch's placement, ready to send along."""

    epoch: int
    placement: tuple[str, ...]
    addresses: dict[str, Address]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of blocks on one node, in model order."""
        return segments_of(self.placement)

    def blocks_of(self, node: str) -> tuple[int, ...]:
        """Indices of the blocks that `node` hosts."""
        return tuple(index for index, name in enumerate(self.placement) if name == node)

    def to_json(self) -> dict[str, Any]:
        """As it stands in commands."""
        addresses = {name: str(address) for name, address in self.addresses.items()}
        return {"epoch": self.epoch, "placement": list(self.placement), "addresses": addresses}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Route:
        """From what `to_json` gave."""
        addresses = {name: Address.parse(text) for name, text in plain["addresses"].items()}
        return cls(int(plain["epoch"]), tuple(plain["placement"]), addresses)
