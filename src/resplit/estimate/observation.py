"""What the detector is shown, as values that can be kept and shown to it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from resplit.cost.model import CostModel
from resplit.estimate.change import Change
from resplit.estimate.cluster import ClusterEstimate
from resplit.pass_times import PassTime
from resplit.types import BlockFeatures

__all__ = ["RECORDING", "LinkSeen", "NodeSeen", "Observation", "Recording", "show"]


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A node's report: its time for the reference layer, and the share of it that others use."""

    node: str
    reference_s: float
    background_utilization: float


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """The one-way time of a probe of `payload_bytes` from `node` to `peer`."""

    node: str
    peer: str
    payload_bytes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Observation:
    """One thing that was shown at `at_s` (monotonic clock): a pass, a node's report, a probe, or a new cost model."""

    at_s: float
    done: PassTime | None = None
    node: NodeSeen | None = None
    link: LinkSeen | None = None
    cost: CostModel | None = None


def show(estimate: ClusterEstimate, seen: Observation) -> list[Change]:
    """Update an estimate by what was seen; returns the changes that this reveals."""
    if seen.cost:
        estimate.set_model(seen.cost)
    if seen.done:
        return estimate.observe(seen.done)
    if seen.node:
        return estimate.observe_report(
            seen.node.node, seen.node.reference_s, seen.node.background_utilization, seen.at_s
        )
    if seen.link:
        link = seen.link
        return estimate.links.observe(link.node, link.peer, link.payload_bytes, link.seconds, seen.at_s)
    return []


@dataclass(frozen=True, slots=True)
class Recording:
    """What the detector of one cluster was shown, from a cost model on.

    `features` are those of the model's chain of blocks, `source` is the node at which requests enter.
    """

    # A node that has not measured the reference layer reports NaN.
    __pydantic_config__: ClassVar[ConfigDict] = {"ser_json_inf_nan": "constants"}

    features: tuple[BlockFeatures, ...]
    source: str
    observations: tuple[Observation, ...]

    @property
    def duration_s(self) -> float:
        """Seconds from the first observation to the last."""
        return self.observations[-1].at_s - self.observations[0].at_s if self.observations else 0.0

    def changes(self) -> list[Change]:
        """What the detector finds when it is shown all of it again."""
        estimate = ClusterEstimate(self.features, self.source)
        return [change for seen in self.observations for change in show(estimate, seen)]


# To JSON and back.
RECORDING = TypeAdapter(Recording)
