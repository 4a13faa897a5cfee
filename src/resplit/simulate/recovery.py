"""Recovery in simulated time: a lost node is noticed after a while, and the cluster plans without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resplit.control.planning import plan_without, planned_for
from resplit.decide.state import Placement
from resplit.epochs import RECOVER, Proposal
from resplit.errors import ProposalRefusedError
from resplit.simulate.agenda import Agenda
from resplit.simulate.deployment import SimulatedDeployment
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.planning import SimulatedPlanner
from resplit.simulate.sessions import SimulatedRoute
from resplit.types import Problem

__all__ = ["SimulatedRecovery"]

_AGAIN_S = 0.25  # then a placement that was refused is planned again


class SimulatedRecovery:
    """Recovers one cluster from losses. `after_loss` gives the placement that was planned for a loss, if there is one.

    A plan has `work_limit` steps.
    """

    def __init__(
        self,
        planner: SimulatedPlanner,
        deployment: SimulatedDeployment,
        gateway: SimulatedGateway,
        agenda: Agenda,
        work_limit: int | None,
    ) -> None:
        self.after_loss: Callable[[Sequence[str]], Placement | None] = lambda lost: None
        self._planner = planner
        self._deployment = deployment
        self._gateway = gateway
        self._agenda = agenda
        self._work_limit = work_limit

    def notice(self, node: str) -> None:
        """The cluster notices that a node is lost."""
        self._planner.lost.add(node)
        self._gateway.lose(node)
        self._recover_if_broken()

    def returned(self, node: str) -> None:
        """A node is back."""
        self._planner.lost.discard(node)
        if self._deployment.live is not None:
            self._recover_if_broken()

    def _recover_if_broken(self) -> None:
        if self._gateway.broken:
            self._recover()

    def _recover(self) -> None:
        """Plan without the nodes that are lost, and deploy: the live epoch cannot serve."""
        live, problem = self._deployment.live, self._planner.latest
        if live is None or problem is None:
            return
        proposal = self._planned_for(problem, live.epoch) or self._replanned(problem, live)
        if proposal is None:
            self._agenda.after(_AGAIN_S, self._recover_if_broken)
            return
        try:
            self._deployment.deploy(proposal, lambda epoch: None)
        except ProposalRefusedError:  # another epoch is being prepared
            self._agenda.after(_AGAIN_S, self._recover_if_broken)

    def _planned_for(self, problem: Problem, epoch: int) -> Proposal | None:
        """The placement that was planned for this loss."""
        lost = self._planner.lost
        return planned_for(problem, self.after_loss(sorted(lost)), lost, epoch)

    def _replanned(self, problem: Problem, live: SimulatedRoute) -> Proposal | None:
        plan = plan_without(problem, self._planner.lost, live.placement, self._work_limit).plan
        if plan.placement is None or plan.terms is None:
            return None
        return Proposal(plan.placement, RECOVER, live.epoch, plan.terms.latency_s, plan.lower_bound)
