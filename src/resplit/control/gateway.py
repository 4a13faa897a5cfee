"""The gateway as the controller sees it. The controller does not import the gateway; this interface stands between."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from resplit.config import ClusterConfig
from resplit.session_records import SessionRecord
from resplit.status import GatewayStatus
from resplit.types import BlockFeatures, RequestClass
from resplit.wire.links import Shape
from resplit.wire.routes import Route


class Gateway(Protocol):
    """What the controller needs from a gateway."""

    def activate(self, route: Route) -> None:
        """Make a committed epoch the live one. Running sessions move to it at a token boundary."""
        ...

    def paused(self) -> AbstractAsyncContextManager[None]:
        """A context in which no pass runs; sessions wait at a token boundary. CapacityError if one does not end."""
        ...

    async def move_all(self, route: Route) -> None:
        """While passes are paused: move every session and its caches to `route`. Without caches it is replayed."""
        ...

    def reconfigure(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        """Serve under a changed cluster file. `drained` nodes must get no new caches."""
        ...

    def oldest_epoch(self) -> int:
        """The oldest epoch that any session still uses."""
        ...

    def session_names(self) -> list[str]:
        """The names of the running sessions."""
        ...

    def connected_nodes(self) -> set[str]:
        """The nodes that the gateway has a working connection to."""
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

    def recoveries(self, epoch: int | None) -> dict[str, float]:
        """How sessions went on in `epoch` after a loss; empty where none had to."""
        ...

    def demand(self, window_s: float) -> list[RequestClass]:
        """The demand of each class, as seen over the last `window_s` seconds."""
        ...

    def set_link(self, other: str, shape: Shape) -> None:
        """Change the emulated link from the source node to another node."""
        ...
