"""The gateway as the controller sees it: the interface through which the controller uses it without importing it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from resplit.config import ClusterConfig
from resplit.estimate import Forecast
from resplit.session_records import RecoveredSessions, SessionRecord
from resplit.status import GatewayStatus
from resplit.types import BlockFeatures, RequestClass
from resplit.wire.emulated_link import Shape
from resplit.wire.routes import Route


class Gateway(Protocol):
    """What the controller needs from a gateway."""

    def activate(self, route: Route) -> None:
        """Make a committed epoch the live one. Running sessions move to it at a token boundary."""
        ...

    def paused(self) -> AbstractAsyncContextManager[None]:
        """A context in which no pass runs; sessions wait at a token boundary. CapacityError if a pass does not end."""
        ...

    async def move_all(self, route: Route) -> None:
        """While passes are paused: move every session to `route` with its caches. If they are lost, it is replayed."""
        ...

    def reconfigure(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        """Serve under a changed cluster file. `drained` nodes must get no new caches.

        From now on nothing is sent along a route that breaks its privacy rule. Sessions wait for a route that does not.
        """
        ...

    def leave(self, nodes: frozenset[str]) -> None:
        """From now on send nothing along a route with one of these nodes. Sessions there continue on the live route."""
        ...

    def oldest_epoch(self) -> int:
        """The oldest epoch that any session still uses."""
        ...

    def welcome(self, node: str) -> None:
        """Let running sessions keep replicas on a node that answers again and knows the others."""
        ...

    def session_names(self) -> list[str]:
        """The names of the running sessions."""
        ...

    def connected_nodes(self) -> set[str]:
        """The nodes to which the gateway is connected."""
        ...

    def faults(self) -> dict[str, str]:
        """What each node did that counts as lost for it."""
        ...

    def suspects(self) -> frozenset[str]:
        """The nodes that were faulty, also those that answer again, except where it is forgiven."""
        ...

    def clocks_ahead_s(self) -> dict[str, float]:
        """The clock of each node less this one, when it connected last."""
        ...

    def set_unavailable(self, reason: str) -> None:
        """Fail requests with `reason`: no placement is possible now."""
        ...

    def set_available(self) -> None:
        """Let requests wait for a placement again."""
        ...

    def status(self) -> GatewayStatus:
        """Sessions that run and wait, and whether requests can be served."""
        ...

    def records(self, skip: int) -> list[SessionRecord]:
        """The records of all requests that ended, without the first `skip`."""
        ...

    def recoveries(self, epoch: int | None) -> RecoveredSessions | None:
        """How sessions recovered into `epoch` after a loss; None if none did."""
        ...

    def demand(self, window_s: float) -> list[RequestClass]:
        """The demand of each class: arrivals of the last `window_s` seconds, blended with the declared demand."""
        ...

    def rates(self) -> dict[str, Forecast]:
        """The requests per second that are expected of each class."""
        ...

    def set_link(self, other: str, shape: Shape) -> None:
        """Change the emulated link from the source node to another node."""
        ...
