"""What the control loops of a simulated cluster know: cost model, estimate, latest problem and lost nodes.

The problems that they decide on are posed here. Nothing is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from resplit.config import ClusterConfig
from resplit.control.planning import DEMAND_WINDOW_S, without
from resplit.cost import CostModel, NodeReading, fit_cost_model, node_readings, problem_from
from resplit.estimate import ClusterEstimate, Estimates, speed_jumps, under_estimates
from resplit.simulate.agenda import Agenda
from resplit.simulate.deployment import SimulatedDeployment
from resplit.simulate.gateway import SimulatedGateway
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures, Problem, RequestClass

__all__ = ["SimulatedPlanner"]


class SimulatedPlanner:
    """Poses the problems of one cluster. `latest` is the problem that was posed last, `lost` are the lost nodes.

    The cost model is to be fitted from `fit_due_s` on.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        features: Sequence[BlockFeatures],
        cost: CostModel,
        deployment: SimulatedDeployment,
        gateway: SimulatedGateway,
        agenda: Agenda,
    ) -> None:
        self.cost = cost
        self.estimate = ClusterEstimate(features, cluster.source)
        self.estimate.set_model(cost)
        self.latest: Problem | None = None
        self.lost: set[str] = set()
        self.fit_due_s = -math.inf
        self._cluster = cluster
        self._features = features
        self._deployment = deployment
        self._gateway = gateway
        self._agenda = agenda
        self._readings = {node.name: NodeReading(node.memory, 0.0) for node in cluster.nodes}

    def fit(self, telemetry: Telemetry, again_s: float) -> None:
        """Fit the cost model, and let the estimate start from it. DataError if the telemetry is not sufficient.

        The next fit is due `again_s` later, or after `fit_soon`.
        """
        now_s = self._agenda.now_s
        jumps = speed_jumps(self.estimates(), now_s)
        self.cost = fit_cost_model(telemetry, self._features, self.cost, hold_out=False, jumps=jumps)
        self.estimate.set_model(self.cost)
        self.fit_due_s = now_s + again_s

    def fit_soon(self) -> None:
        """Fit at the next tick: nodes or links have changed, or blocks have moved."""
        self.fit_due_s = -math.inf

    def read(self, nodes: pd.DataFrame) -> None:
        """Take memory and background load of the nodes from a table of their reports."""
        self._readings = node_readings(nodes)

    def pose(self, demand: Sequence[RequestClass]) -> Problem:
        """Pose the problem of this demand by the cost model and the latest readings."""
        live = self._deployment.live
        self.latest = problem_from(
            self.cost,
            self._features,
            self._cluster,
            self._readings,
            demand,
            live.placement if live else None,
            self.lost,
        )
        return self.latest

    def estimates(self) -> Estimates:
        """The estimate of each node and link now, and the requests that are expected."""
        return replace(self.estimate.estimates(self._agenda.now_s), rates_rps=self._gateway.journal.rates())

    def present_problem(self) -> Problem:
        """The latest problem under what is known and asked for now."""
        live = self._deployment.live
        assert live is not None
        assert self.latest is not None
        posed = replace(
            without(self.latest, self.lost),
            current=live.placement,
            classes=tuple(self._gateway.journal.demand(DEMAND_WINDOW_S)),
        )
        return under_estimates(posed, self.estimates())
