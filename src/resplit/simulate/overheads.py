"""What the processes of a cluster add to the declared times of nodes and links."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MEASURED", "NO_OVERHEADS", "Overheads"]


@dataclass(frozen=True)
class Overheads:
    """Seconds that software takes, besides those for messages and for passes at the gateway.

    `request_s` passes before a request asks for admission, `token_s` at the gateway between a token and the next pass,
    and `batch_s` on a node before each batch. With `background_traffic`, probes and caches that are sent in the
    background take bandwidth from messages.
    """

    request_s: float = 0.0
    token_s: float = 0.0
    batch_s: float = 0.0
    background_traffic: bool = False


NO_OVERHEADS = Overheads()
# As measured in nine runs with seed 7 on two cores (`python -m benchmarks.replay --overheads`).
MEASURED = Overheads(request_s=0.0012, token_s=0.001, batch_s=0.0008, background_traffic=True)
