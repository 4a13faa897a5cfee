"""What the controller lets a node accept of one session, as a value and as a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from resplit.wire.node_pb2 import PermitRequest


@dataclass(frozen=True)
class Permit:
    """What a node accepts of one session: nothing of another attempt, nothing above `capacity` tokens.

    `epochs` are those in whose routes its passes run. `senders` are the nodes that may send its caches, by block.
    """

    attempt: int
    capacity: int
    epochs: frozenset[int] = frozenset()
    senders: Mapping[int, str] = field(default_factory=dict)

    def to_wire(self, session: str, keep: bool) -> PermitRequest:
        """The message that tells a node this permit. `keep`: an attempt that begins with it keeps earlier caches."""
        return PermitRequest(
            session=session,
            attempt=self.attempt,
            capacity=self.capacity,
            epochs=sorted(self.epochs),
            senders=dict(self.senders),
            keep=keep,
        )

    @classmethod
    def from_wire(cls, request: PermitRequest) -> Permit:
        """The permit in a message."""
        return cls(request.attempt, request.capacity, frozenset(request.epochs), dict(request.senders))
