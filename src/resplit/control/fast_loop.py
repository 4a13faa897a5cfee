"""The fast loop: reacts to detected changes within a second, with the models that the slow loop set.

Every pass and every report of a node updates the estimate. If it reveals a jump, the loop puts the estimate into the
latest problem, decides with the code that the slow loop uses, and deploys. One decision runs at a time. Changes that
are detected meanwhile are seen by the next one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.log import EpochLog
from resplit.control.moves import Moves
from resplit.control.planning import ControllerPlanner
from resplit.cost.model import CostModel
from resplit.decide import Decision, DecisionOutcome, Settings, registry_bytes_per_s
from resplit.errors import ProposalRefusedError, ResplitError
from resplit.estimate import Change, ClusterEstimate, Estimates, under_estimates
from resplit.pass_times import PassTime
from resplit.process.cancellation import VitalTasks
