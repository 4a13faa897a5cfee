"""The present state of nodes, estimated from every pass. Pure: times are handed in, nothing reads a clock."""

from resplit.estimate.cluster import Change, ClusterEstimate, NodeEstimate, under_estimates
from resplit.estimate.level import Level

__all__ = ["Change", "ClusterEstimate", "Level", "NodeEstimate", "under_estimates"]
