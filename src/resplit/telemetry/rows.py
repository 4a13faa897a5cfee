"""The rows of the telemetry tables: measurements by a node of itself, its links and its blocks.

A node writes rows, the monitor checks them, `resplit.telemetry.tables` makes tables of them. Columns and units are
stated here only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

# What a node may report at all. Whether a value is plausible is a question for the validation of telemetry.
MAX_NAME_CHARS = 200
# In one report; the next one has the rows after these. While the controller reads a report, every stream waits.
MAX_REPORTED_ROWS = 2_000
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
UnixTime = Annotated[float, Field(allow_inf_nan=False)]  # seconds since 1970
_STRICT: ConfigDict = {"extra": "forbid"}  # applies when rows are parsed


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One report of a node.

    `cpu_utilization` is the share of the whole machine in 0..1, `own_utilization` the part of it that resplit uses.
    `memory_held_bytes` is held by resplit's weights and caches, `memory_free_bytes` is left for more of them.
    `reference_s` is the node's time for one decode step of the public reference layer. With it, the fit can predict a
    node that has no block timings yet.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    time_s: UnixTime
    node: Name
    cpu_utilization: float
    own_utilization: float
    memory_free_bytes: float
    memory_held_bytes: float
    gpu_utilization: float  # NaN without a GPU
    reference_s: float
    emulated: bool


@dataclass(frozen=True, slots=True)
class LinkRow:
    """One message from `node` to `peer`; `seconds` is its one-way time, software included."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    time_s: UnixTime
    node: Name
    peer: Name
    payload_bytes: float
    seconds: float
    source: Name  # "active": a probe; "passive": an activation
    emulated: bool


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One pass through one block, of `sessions` sessions together.

    `tokens` are the new tokens of all of them, `context_tokens` the mean number of tokens cached before.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    time_s: UnixTime
    node: Name
    block: Name
    kind: Name  # embed, layer, attention, mlp or head
    phase: Name  # prefill or decode
    tokens: Count
    context_tokens: Count
    sessions: Count
    seconds: float
    emulated: bool


@dataclass(frozen=True, slots=True)
class TelemetryRows:
    """Rows by table."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    nodes: tuple[NodeRow, ...] = ()
    links: tuple[LinkRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
