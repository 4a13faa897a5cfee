"""The present state of nodes and links, estimated from every pass. Pure: times are handed in, nothing reads a clock."""

from resplit.estimate.change import Change
from resplit.estimate.cluster import ClusterEstimate, Estimates, NodeEstimate, ahead, speed_jumps, under_estimates
from resplit.estimate.forecast import ArrivalRate, Forecast
from resplit.estimate.level import Level
from resplit.estimate.links import LinkEstimate, LinkEstimates, both_ways
from resplit.estimate.observation import RECORDING, LinkSeen, NodeSeen, Observation, Recording, show

__all__ = [
    "RECORDING",
    "ArrivalRate",
    "Change",
    "ClusterEstimate",
    "Estimates",
    "Forecast",
    "Level",
    "LinkEstimate",
    "LinkEstimates",
    "LinkSeen",
    "NodeEstimate",
    "NodeSeen",
    "Observation",
    "Recording",
    "ahead",
    "both_ways",
    "show",
    "speed_jumps",
    "under_estimates",
]
