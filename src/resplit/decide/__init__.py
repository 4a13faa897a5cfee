"""The decision of each control tick: keep today's placement, redistribute, re-split, or roll back.

Pure functions of values; knows the planner, and nothing of clocks, clusters or deployment.
"""

from resplit.decide.orchestrator import Decision, decide
from resplit.decide.price import Alternative
from resplit.decide.state import History, Measured, PastMove, Settings

__all__ = ["Alternative", "Decision", "History", "Measured", "PastMove", "Settings", "decide"]
