"""Scenario files: a cluster, the length of a workload, and the changes while it runs. Times count from its start.

docs/scenarios.md describes the format, docs/scenario.schema.json is its JSON Schema.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from resplit.config import ClusterConfig
from resplit.errors import ConfigError
from resplit.units import BytesPerSecond, Seconds
from resplit.yaml_files import Strict, known, load_file

__all__ = [
    "AreaConfig",
    "LinkChange",
    "LoadChange",
    "NodeChange",
    "ScenarioConfig",
    "Trace",
    "cluster_of",
    "load_scenario",
    "scenario_schema",
]


class _ScenarioChange(Strict):
    at: Annotated[Seconds, Field(description="when, from the start of the workload")]
    label: Annotated[str, Field(description="the change in a few words, for reports")]


class NodeChange(_ScenarioChange):
    """A node becomes slower or faster, others use it, or it leaves and comes back. What is absent stays as it is."""

    node: str
    slowdown: Annotated[
        float | None, Field(gt=0, description="factor on the node's declared times; 1 is as declared")
    ] = None
    background_utilization: Annotated[
        float | None, Field(ge=0, lt=1, description="share of the node that others use")
    ] = None
    up: Annotated[bool | None, Field(description="false: the node's process is killed; true: it is started again")] = (
        None
    )

    @model_validator(mode="after")
    def _changes_something(self) -> NodeChange:
        if self.slowdown is None and self.background_utilization is None and self.up is None:
            raise ValueError("a change of a node needs slowdown, background_utilization or up")
        return self


class LinkChange(_ScenarioChange):
    """A link changes in both directions. What is absent stays as it is."""

    between: tuple[str, str]
    latency: Annotated[Seconds | None, Field(description="propagation delay, one way")] = None
    bandwidth: Annotated[BytesPerSecond | None, Field(gt=0)] = None
    loss: Annotated[float | None, Field(ge=0, lt=1, description="share of packets lost; simulated only")] = None
    up: Annotated[bool | None, Field(description="false: nothing passes; simulated only")] = None

    @model_validator(mode="after")
    def _changes_something(self) -> LinkChange:
        if self.latency is None and self.bandwidth is None and self.loss is None and self.up is None:
            raise ValueError("a change of a link needs latency, bandwidth, loss or up")
        return self


class LoadChange(_ScenarioChange):
    """The arrival rate of a class changes."""

    request_class: str
    rate_rps: Annotated[float, Field(ge=0, description="requests per second; 0 is none")]


class _TraceOptions(Strict):
    file: Annotated[str, Field(description="CSV, plain or .gz; a path relative to the scenario file")]
    shift: Annotated[Seconds, Field(description="the trace is read from this time on")] = 0.0
    speed: Annotated[float, Field(gt=0, description="60 plays an hour of the trace in a minute")] = 1.0
    scale: Annotated[float, Field(gt=0, description="factor on the values")] = 1.0
    clip: Annotated[
        tuple[float, float] | None, Field(description="least and greatest value, after scaling, in the file's unit")
    ] = None


class RequestTrace(_TraceOptions):
    """Requests of one class, which replace its declared ones. Columns arrival_s, prompt_tokens, output_tokens.

    `scale` and `clip` are for both numbers of tokens.
    """

    kind: Literal["requests"]
    request_class: str
    every: Annotated[int, Field(ge=1, description="only each n-th request")] = 1


class BandwidthTrace(_TraceOptions):
    """The bandwidth of a link. Columns trace_id, time_s, duration_s, throughput_bps."""

    kind: Literal["bandwidth"]
    trace_id: str
    between: tuple[str, str]


class RttTrace(_TraceOptions):
    """Latencies of links, half of the round trips, from the start. Columns node_a, node_b, rtt_median_ms."""

    kind: Literal["rtt"]
    nodes: Annotated[dict[str, str], Field(description="the trace's name of each node of the cluster")]


class BackgroundTrace(_TraceOptions):
    """The share of a node that others use. Columns vm, time_s, duration_s, cpu_utilization (0 to 1)."""

    kind: Literal["background"]
    vm: str
    node: str


class ChurnTrace(_TraceOptions):
    """Nodes that come and go. Columns time_s, event (add or remove), node; with trace_id, only those of one trace.

    `scale` and `clip` have no meaning here.
    """

    kind: Literal["churn"]
    trace_id: str | None = None
    nodes: Annotated[dict[str, str], Field(description="the trace's name of each node of the cluster")]


Trace = Annotated[RequestTrace | BandwidthTrace | RttTrace | BackgroundTrace | ChurnTrace, Field(discriminator="kind")]


class AreaConfig(Strict):
    """The cluster is grown over an area: a copy of one of its nodes at each position, linked by real round trips."""

    positions: Annotated[str, Field(description="CSV with the columns kind, id, latitude, longitude; as `traces.file`")]
    round_trips: Annotated[str, Field(description="CSV with the columns node_a, node_b, rtt_median_ms")]
    within: Annotated[Seconds, Field(gt=0, description="only round trips up to this one are those of an area")]
    sites: Annotated[
        tuple[str, ...], Field(min_length=1, description="nodes of which, in turn, a copy stands at each edge_server")
    ]
    homes: Annotated[tuple[str, ...], Field(description="nodes of which, in turn, a copy stands at users")] = ()
    most_homes: Annotated[int, Field(ge=0, description="at so many users")] = 0


class ScenarioConfig(Strict):
    """A scenario file. The requests of each class arrive at the rate that the cluster file declares until it changes.

    `simulated_only`: the cluster has more nodes, or more load, than one machine can run.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    cluster: Annotated[str | None, Field(description="the cluster file; a path relative to this file")] = None
    model: Annotated[
        str | None, Field(description="the sizes of the model's blocks, for the simulator; relative to this file")
    ] = None
    duration: Annotated[Seconds, Field(gt=0)]
    simulated_only: bool = False
    area: AreaConfig | None = None
    nodes: tuple[NodeChange, ...] = ()
    links: tuple[LinkChange, ...] = ()
    load: tuple[LoadChange, ...] = ()
    traces: tuple[Trace, ...] = ()

    @property
    def files(self) -> list[str]:
        """The files that it names beside the cluster: of the model's sizes, of traces and of its area."""
        model = [self.model] if self.model else []
        area = [self.area.positions, self.area.round_trips] if self.area else []
        return [*model, *(trace.file for trace in self.traces), *area]

    def check_against(self, cluster: ClusterConfig, place: str) -> None:
        """ConfigError where the scenario names a node or class that the cluster does not have."""
        nodes, classes = cluster.node_names, [declared.name for declared in cluster.classes]
        try:
            known("nodes", [change.node for change in self.nodes], nodes)
            known("links", [name for change in self.links for name in change.between], nodes)
            known("load", [change.request_class for change in self.load], classes)
            for trace in self.traces:
                _trace_fits(trace, nodes, classes)
            if self.area is not None:
                known("area.sites", self.area.sites, nodes)
                known("area.homes", self.area.homes, nodes)
        except ValueError as error:
            raise ConfigError(place, str(error)) from None
        changed = [c.node for c in self.nodes if c.slowdown is not None or c.background_utilization is not None]
        if unemulated := [node for node in changed if cluster.node(node).emulate is None]:
            raise ConfigError(place, f"nodes: {unemulated[0]!r} is real hardware; only an emulated node can be changed")

    def check_live(self, place: str) -> None:
        """ConfigError if a cluster of processes cannot play this scenario."""
        if self.simulated_only or self.area is not None:
            raise ConfigError(
                place, "is only for the simulator, as its simulated_only or its area says: `resplit simulate`"
            )
        for change in self.links:
            for key in ("loss", "up"):
                if getattr(change, key) is not None:
                    raise ConfigError(place, f"links: {change.label!r} sets {key}, which only `resplit simulate` plays")


def _trace_fits(trace: Trace, nodes: list[str], classes: list[str]) -> None:
    key = f"traces: {trace.kind}"
    match trace:
        case RequestTrace():
            known(key, [trace.request_class], classes)
        case BandwidthTrace():
            known(key, trace.between, nodes)
        case BackgroundTrace():
            known(key, [trace.node], nodes)
        case RttTrace() | ChurnTrace():
            known(key, list(trace.nodes), nodes)


def load_scenario(path: Path) -> ScenarioConfig:
    """Read a scenario file; ConfigError names file, line, key and rule. Its traces are not read."""
    return load_file(path, ScenarioConfig)


def cluster_of(path: Path) -> Path:
    """The cluster file that the scenario file at `path` names. ConfigError if it names none."""
    named = load_scenario(path).cluster
    if named is None:
        raise ConfigError(str(path), "names no cluster; add `cluster: ../clusters/NAME.yaml`")
    return Path(os.path.normpath(path.parent / named))


def scenario_schema() -> dict[str, Any]:
    """The JSON Schema of a scenario file, as docs/scenario.schema.json has it."""
    schema = ScenarioConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(scenario_schema(), indent=1) + "\n")
