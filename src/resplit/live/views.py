"""What the live page shows, as values. The stream sends them as JSON; unknown and infinite numbers are null.

Times are in seconds since 1970. Nothing here is secret: no text of a request, no key, no address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resplit.epochs import LiveEpoch
from resplit.session_records import SessionRecord


@dataclass(frozen=True)
class RequestClassView:
    """A request class and its service objective."""

    name: str
    slo_s: float | None


@dataclass(frozen=True)
class ModelView:
    """What rarely changes: the cluster's names, the model's blocks (`private` are indices) and the gateway's limits."""

    cluster: str
    model: str
    source: str
    blocks: tuple[str, ...]
    private: tuple[int, ...]
    classes: tuple[RequestClassView, ...]
    sessions: int
    kv_tokens: int


@dataclass(frozen=True)
class NodeView:
    """A node as the controller sees it. `heard_s` is when its last report came; None before the first.

    `blocks` are loaded; `copies` are the blocks of which it holds KV replicas. `answers` is False for a lost node, and
    `fault` says what it did if that is the reason.
    """

    name: str
    answers: bool
    fault: str | None
    trusted: bool
    drained: bool
    emulated: bool
    memory_bytes: float
    held_bytes: float
    blocks: tuple[int, ...]
    copies: tuple[int, ...]
    sessions: int
    refusals: Mapping[str, int]
    heard_s: float | None


@dataclass(frozen=True)
class SpeedView:
    """The estimated speed of a node: `layer_s` is the time of a decode step in one layer.

    The cost model is wrong by `factor` now. Others use `background` of the node. `seen_s` is when a pass or a report
    showed that last.
    """

    node: str
    layer_s: float | None
    factor: float
    deviation: float
    background: float | None
    seen_s: float | None


@dataclass(frozen=True)
class LinkView:
    """The estimated link from one node to another."""

    node: str
    peer: str
    latency_s: float
    bandwidth_bytes_per_s: float
    seen_s: float | None


@dataclass(frozen=True)
class ServiceView:
    """The gateway now. `ready` is "yes" or the reason why not; `tokens` and `responses` count since its start.

    `cached_tokens` are reserved by running sessions. `responses` are ended requests by HTTP status.
    """

    ready: str
    sessions: int
    waiting: int
    cached_tokens: int
    tokens: float
    responses: Mapping[str, float]
    note: str
    warning: str


@dataclass(frozen=True)
class FlowView:
    """Sums over all passes since somebody watches: passes, and seconds in queues, in batches and between nodes."""

    passes: int = 0
    waited_s: float = 0.0
    computed_s: float = 0.0
    hops_s: float = 0.0
    nodes: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # waited and computed seconds


@dataclass(frozen=True)
class RequestView:
    """A request that ended, the `number`-th. It spent `waited_s` in queues of nodes and `computed_s` in their batches.

    `hops_s` were between nodes, and between them and the gateway.
    """

    number: int
    request_class: str
    arrival_s: float
    first_token_s: float
    end_s: float
    new_tokens: int
    status: int
    waited_s: float
    computed_s: float
    hops_s: float
    moves: int

    @classmethod
    def of(cls, record: SessionRecord, number: int) -> RequestView:
        """The part of a record that the page shows."""
        return cls(
            number,
            record.request_class,
            record.arrival_s,
            record.first_token_s,
            record.end_s,
            record.new_tokens,
            record.status,
            record.waited_s,
            record.computed_s,
            record.hops_s,
            len(record.moves),
        )


@dataclass(frozen=True)
class Sections:
    """The parts of the page that are replaced as a whole when they change."""

    model: ModelView
    nodes: tuple[NodeView, ...]
    speeds: tuple[SpeedView, ...]
    links: tuple[LinkView, ...]
    epochs: tuple[LiveEpoch, ...]
    service: ServiceView
    flow: FlowView

    def changed_since(self, before: Sections | None) -> dict[str, Any]:
        """The parts that differ from `before`, by name; all without it."""
        return {name: part for name, part in vars(self).items() if before is None or part != getattr(before, name)}
