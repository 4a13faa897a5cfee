"""The adaptive orchestrator (section III-C of the paper): keep, redistribute, re-split or roll back.

Pure functions of values: time, measurements and history are passed in.
"""

from resplit.decide.decision import Brought, Decision, DecisionOutcome, RecoveredSessions
from resplit.decide.measurements import for_a_change, measured_since, registry_bytes_per_s
from resplit.decide.news import LastPlan, has_news
from resplit.decide.orchestrator import decide
from resplit.decide.price import Alternative
from resplit.decide.state import History, Measured, PastMove, Ready, Settings
from resplit.decide.words import in_words

__all__ = [
    "Alternative",
    "Brought",
    "Decision",
    "DecisionOutcome",
    "History",
    "LastPlan",
    "Measured",
    "PastMove",
    "Ready",
    "RecoveredSessions",
    "Settings",
    "decide",
    "for_a_change",
    "has_news",
    "in_words",
    "measured_since",
    "registry_bytes_per_s",
]
