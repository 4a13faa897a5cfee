"""Status as values: what nodes report, and what the control API answers about cluster, model and decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resplit.telemetry_rows import TelemetryRows
from resplit.types import BlockFeatures


@dataclass(frozen=True)
class ReportedState:
    """What a node says of itself. `pid` None: it has not reported yet.

    `blocks` are the blocks that are loaded; `copies` are the blocks of which it holds replicas of caches, `copy_bytes`
    in all. `epochs` are the epochs that it serves, `prepared` those that are ready for a commit. `refusals` counts
    refused commands by reason. `emulation_error` is the median of |padded / declared - 1| over the passes so far.
    """

    node: str
    pid: int | None
    trusted: bool = False
    emulated: bool = False
    emulation_error: float | None = None
    memory_bytes: float = 0.0
    held_bytes: float = 0.0
    blocks: tuple[int, ...] = ()
    sessions: int = 0
    copies: tuple[int, ...] = ()
    copy_bytes: float = 0.0
    epochs: tuple[int, ...] = ()
    prepared: tuple[int, ...] = ()
    refusals: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeReport:
    """A node's answer to the monitor: its state, and its telemetry rows since the answer before."""

    state: ReportedState
    rows: TelemetryRows


@dataclass(frozen=True, kw_only=True)
class NodeStatus(ReportedState):
    """A node as the controller sees it: its last report, its address, and whether it answers now."""

    address: str
    answers: bool
    drained: bool


@dataclass(frozen=True)
class GatewayStatus:
    """Sessions that run, requests that wait, and "yes" or the reason why no request can be served."""

    sessions: int
    waiting: int
    ready: str


@dataclass(frozen=True)
class ClusterStatus:
    """What is live: `placement` names one node per block, None before the first epoch."""

    cluster: str
    model: str
    note: str
    blocks: tuple[str, ...]
    epoch: int
    placement: tuple[str, ...] | None
    action: str | None
    predicted_latency_s: float | None
    nodes: tuple[NodeStatus, ...]
    sessions: int
    waiting: int
    ready: str


@dataclass(frozen=True)
class ModelStatus:
    """The model's blocks and where they are live; `lost` nodes do not answer, `drained` ones are to hold nothing."""

    name: str
    note: str
    features: tuple[BlockFeatures, ...]
    epoch: int
    placement: tuple[str, ...] | None
    lost: tuple[str, ...]
    drained: tuple[str, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """The nodes that no plan can use."""
        return (*self.lost, *self.drained)


@dataclass(frozen=True)
class DecisionEntry:
    """One entry of the decision log. `body` is as it was written: its keys depend on who decided."""

    id: int
    body: dict[str, Any]
