"""The route of a pass through an epoch's placement: its segments in order, and where their nodes listen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator

from resplit.security.identity import CONTROLLER
from resplit.types import Segment, segments_of
from resplit.wire.addresses import Address

AddressText = Annotated[Address, PlainValidator(Address.parse), PlainSerializer(str)]  # in JSON: "host:port"


@dataclass(frozen=True)
class Route:
    """One epoch's placement (one node name per block), and the addresses of its nodes."""

    epoch: int
    placement: tuple[str, ...]
    addresses: dict[str, AddressText]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of consecutive blocks on one node, in model order."""
        return segments_of(self.placement)

    def sender_to(self, node: str, segment: int) -> str | None:
        """The member that sends the steps of a segment to `node`; None if the segment is not there.

        The gateway, which is in the controller's process, sends those of segment 0.
        """
        if segment >= len(self.segments) or self.segments[segment].node != node:
            return None
        return self.segments[segment - 1].node if segment else CONTROLLER

    def blocks_of(self, node: str) -> tuple[int, ...]:
        """Indices of the blocks that `node` hosts."""
        return tuple(index for index, name in enumerate(self.placement) if name == node)
