"""What the controller asks of the gateway, which it does not know."""

from __future__ import annotations

from typing import Any, Protocol

from resplit.wire.links import Shape
from resplit.wire.route import Route


class Gateway(Protocol):
    """The gateway as the controller sees it."""

    def flip(self, route: Route) -> None:
        """Make a committed epoch the live one; running sessions follow at a token boundary."""
        ...

    def oldest_epoch(self) -> int:
        """The oldest epoch that a session still uses."""
        ...

    def sessions(self) -> list[str]:
        """Names of the sessions that run."""
        ...

    def answering(self) -> set[str]:
        """The nodes whose connections stand."""
        ...

    def give_up(self, reason: str | None) -> None:
        """Let requests fail with `reason`, because no placement is possible now; None: there is hope again."""
        ...

    def state(self) -> dict[str, Any]:
        """Sessions that run and wait, and whether requests can be served."""
        ...

    def records(self, skip: int) -> list[dict[str, Any]]:
        """What became of every request, without the first `skip`."""
        ...

    def demand(self, window_s: float) -> list[dict[str, Any]]:
        """The fields of `RequestClass` for each class, as seen over the last `window_s` seconds."""
        ...

    def reshape(self, other: str, shape: Shape) -> None:
        """Change the emulated link from the source node to another."""
        ...
