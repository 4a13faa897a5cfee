"""Status as values: the reports of nodes, and the control API's answers about cluster, model and decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from resplit.pass_times import TimeByNode
from resplit.telemetry.rows import Count, Name, TelemetryRows
from resplit.types import BlockFeatures

# Clocks may differ by 5 s before commands are refused. Telemetry suffers earlier.
_CLOCK_TOLERANCE_S = 1.0
_Bytes = Annotated[float, Field(ge=0, le=2.0**63)]
_Counts = Annotated[tuple[Count, ...], Field(max_length=10_000)]


@dataclass(frozen=True)
class StandbyState:
    """What a node keeps ready for the next epoch: `blocks` that are loaded and not used, and shards on its disk.

    `loaded_bytes` and `fetched_bytes` were read for it, and `processor_s` was computed, since the node started.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    blocks: _Counts = ()
    memory_bytes: _Bytes = 0.0
    disk_bytes: _Bytes = 0.0
    loaded_bytes: _Bytes = 0.0
    fetched_bytes: _Bytes = 0.0
    processor_s: Annotated[float, Field(ge=0, le=2.0**63)] = 0.0


@dataclass(frozen=True)
class ReportedState:
    """The state that a node reports. `pid` is None until its first report.

    `blocks` are the loaded blocks without those that stand by. `copies` are the blocks for which it holds KV replicas,
    of `copy_bytes` in total. `epochs` are the epochs that it serves, `prepared` the epochs that are ready for a commit.
    `refusals` counts refused commands, steps and caches by reason. `emulation_error` is the median of
    |padded / declared - 1| over the passes so far. `cores` are the processor cores that the node may use, by the
    quota of its control group if it has one; `throttled` is the share of a period in which that quota made it wait.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}  # applies when a report is parsed

    node: Name
    pid: Count | None
    trusted: bool = False
    emulated: bool = False
    emulation_error: float | None = None
    memory_bytes: _Bytes = 0.0
    held_bytes: _Bytes = 0.0
    blocks: _Counts = ()
    sessions: Count = 0
    copies: _Counts = ()
    copy_bytes: _Bytes = 0.0
    epochs: _Counts = ()
    prepared: _Counts = ()
    standby: StandbyState = StandbyState()
    cores: Annotated[float, Field(ge=0, le=1e6)] | None = None
    throttled: Annotated[float, Field(ge=0, le=1)] = 0.0
    refusals: Annotated[dict[Name, Count], Field(max_length=100)] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeReport:
    """A node's answer to the monitor: its state, and its telemetry rows since the previous answer.

    It was made at `time_s` by the node's clock, like the rows (seconds since 1970).
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    state: ReportedState
    rows: TelemetryRows
    time_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class NodeStatus(ReportedState):
    """A node as the controller sees it: its last report, its address, and whether it answers now.

    `fault` says what it did that no node does. It counts as lost for that, and is tried again after a while.
    `clock_ahead_s` is its clock less the controller's when it connected.
    """

    address: str
    answers: bool
    drained: bool
    fault: str | None = None
    clock_ahead_s: float = 0.0


def wrong_clock(ahead_s: float) -> str:
    """What is wrong with a clock that is so far ahead of the controller's, in words; "" if nothing is."""
    if abs(ahead_s) <= _CLOCK_TOLERANCE_S:
        return ""
    return f"its clock is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} the controller's: set it (NTP)"


@dataclass(frozen=True)
class GatewayStatus:
    """Running sessions, waiting requests, and in `ready` "yes" or the reason why no request can be served.

    Running sessions have reserved room for `cached_tokens` tokens.
    """

    sessions: int
    waiting: int
    ready: str
    cached_tokens: int = 0


@dataclass(frozen=True)
class ReadinessStatus:
    """The likely changes for which plans are ready, how many are still to be made, and the processor time for them."""

    changes: tuple[str, ...] = ()
    left: int = 0
    processor_s: float = 0.0


@dataclass(frozen=True)
class ClusterStatus:
    """The live epoch and its cluster. `placement` names one node per block; it is None before the first epoch.

    `plan_note` says what the plan of the epoch does not keep: ceilings on utilisation, or a part of the demand.
    `emulation_warning` says why measurements of emulated nodes may be wrong.
    """

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
    plan_note: str = ""
    readiness: ReadinessStatus = ReadinessStatus()
    spent: TimeByNode = field(default_factory=TimeByNode)  # of all passes so far
    emulation_warning: str = ""
    cached_tokens: int = 0


@dataclass(frozen=True)
class ModelStatus:
    """The model's blocks and their live placement. `lost` nodes do not answer, `drained` nodes must hold nothing."""

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
