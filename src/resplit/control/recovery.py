"""Recovery: when the live epoch cannot serve, plan for the remaining nodes and deploy, until it can."""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.log import EpochLog
from resplit.control.planning import ControllerPlanner
from resplit.decide import Decision, DecisionOutcome
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import CapacityError, DataError, InfeasibleError, ProposalRefusedError, ResplitError

_log = structlog.get_logger(__name__)
_RESUME_TRIES = 3  # a plan is outdated if another node is lost meanwhile
# A refused recovery (another loss, a full disk, a registry outage) is tried again after this interval, which doubles up
# to four times. After `_UNAVAILABLE_AFTER_S`, requests fail with the reason instead of waiting.
_RETRY_INTERVAL_S = 0.25
_UNAVAILABLE_AFTER_S = 5.0
_RETURN_TIMEOUT_S = 2.0  # a node that was only busy, or whose link dropped, answers again within this time


class Recovery:
    """Restores the service of one cluster. Only one recovery runs at a time."""

    def __init__(self, view: ClusterView, deployment: Deployment, planner: ControllerPlanner, log: EpochLog) -> None:
        self._view = view
        self._gateway = view.gateway
        self._deployment = deployment
        self._planner = planner
        self._log = log
        self._recovering = asyncio.Lock()
        self._returned = asyncio.Event()  # set and replaced whenever a node answers again

    def node_returned(self) -> None:
        """A node answers, for the first time or again."""
        self._returned.set()
        self._returned = asyncio.Event()

    async def restore(self) -> None:
        """Whatever is needed for an epoch that serves: `resume`, then `recover`."""
        await self.resume()
        await self.recover()

    async def recover(self) -> None:
        """Deploy plans for the remaining nodes until the live epoch can serve, or no plan is possible."""
        async with self._recovering:
            refused_since_s: float | None = None
            refused_by: frozenset[str] = frozenset()
            logged, retry_s = "", _RETRY_INTERVAL_S
            while reason := self._outage_reason():
                unreachable, started_s = self._view.unreachable, time.monotonic()
                try:
                    live = await self._deployment.deploy(await self._plan(refused_by))
                except (InfeasibleError, DataError) as error:
                    if await self._a_node_returns(unreachable) or not self._outage_reason():
                        continue
                    _log.error("no placement is possible: requests fail with the reason", reason=str(error))
                    self._gateway.set_unavailable(_told_to_clients(error))
                    return
                except (ProposalRefusedError, CapacityError) as error:
                    # Its cause does not name the epoch, whose number is a new one each time.
                    cause = str(error.__cause__ or error)
                    if cause != logged:
                        _log.warning("recovery was refused, and is tried until it succeeds", error=str(error))
                        logged = cause
                    refused_by |= _refused_by(error)
                    refused_since_s = refused_since_s or started_s
                    if time.monotonic() - refused_since_s > _UNAVAILABLE_AFTER_S:
                        self._gateway.set_unavailable(_told_to_clients(error))
                    # There is no event, for example, for a registry that is back.
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, 4 * _RETRY_INTERVAL_S)
                    continue
                self._log_decision("; ".join(filter(None, [reason, live.note])), started_s, live)
            self._gateway.set_available()

    async def resume(self) -> None:
        """After a restart: deploy the last committed placement again, or a plan without the nodes that do not answer.

        If neither is possible, requests fail with the reason until another node answers. Does nothing if an epoch is
        live already, or if none ever was.
        """
        async with self._recovering:
            last = self._log.last_committed()
            if last is None or self._deployment.live is not None:
                return
            try:
                await self._deploy_again(last)
            except (ProposalRefusedError, CapacityError, InfeasibleError, DataError) as error:
                _log.error("the last placement cannot be resumed", reason=str(error))
                self._gateway.set_unavailable(_told_to_clients(error))

    async def _deploy_again(self, committed: Proposal) -> None:
        placement, refused_by = committed.placement, frozenset[str]()
        for tries_left in reversed(range(_RESUME_TRIES)):
            proposal = Proposal(placement, "resume", 0, committed.predicted_latency_s, note=committed.note)
            if refused_by or self._view.lost_from(placement) or self._view.rules.violation(placement):
                proposal = await self._planner.plan(placement, 0, avoid=refused_by)
            try:
                await self._deployment.deploy(proposal)
            except (ProposalRefusedError, CapacityError) as error:
                if not tries_left:
                    raise
                refused_by |= _refused_by(error)
            else:
                return

    def _outage_reason(self) -> str | None:
        """Why the live epoch cannot serve; None if it can, or if there is none."""
        live = self._deployment.live
        if live is None:
            return None
        if lost := self._view.lost_from(live.placement):
            return f"lost {', '.join(lost)}"
        return self._deployment.broken or self._view.rules.privacy_violation(live.placement)

    async def _plan(self, refused_by: frozenset[str]) -> Proposal:
        live = self._deployment.live
        assert live is not None
        return await self._planner.plan(live.placement, live.epoch, avoid=refused_by)

    async def _a_node_returns(self, unreachable: list[str]) -> bool:
        """Whether one of these nodes already answers again, or any node does soon. Requests wait meanwhile."""
        if set(unreachable) - set(self._view.unreachable):
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETURN_TIMEOUT_S):
                return await self._returned.wait()
        return False

    def _log_decision(self, reason: str, started_s: float, live: LiveEpoch) -> None:
        plan_s = time.monotonic() - started_s - live.prepare_s
        outcome = DecisionOutcome(live.epoch, plan_s=plan_s, prepare_s=live.prepare_s)
        with contextlib.suppress(CapacityError):  # a full disk must not make the recovery fail
            self._log.append_decision(Decision(time.time(), RECOVER, reason, outcome=outcome))


def _told_to_clients(error: ResplitError) -> str:
    """Why no request can be served. What nodes and disks say is for the log only, because it names folders."""
    if isinstance(error, InfeasibleError | DataError):
        return str(error)
    who = ", ".join(sorted(_refused_by(error))) or "the controller"
    return f"{who} cannot prepare a placement; the log of the controller says why"


def _refused_by(error: ResplitError) -> frozenset[str]:
    """The nodes that the next plan avoids if it can."""
    return error.refused_by if isinstance(error, ProposalRefusedError) else frozenset()
