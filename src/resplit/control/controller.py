"""The controller of one cluster, assembled from its parts. It alone writes epochs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from resplit.config import ClusterConfig
from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.fast_loop import FastLoop
from resplit.control.gateway import Gateway
from resplit.control.log import EpochLog
from resplit.control.membership import Membership
from resplit.control.move_history import Moves
from resplit.control.node_commands import NodeCommands
from resplit.control.outcomes import Outcomes
from resplit.control.planning import ControllerPlanner
from resplit.control.readiness import Readiness
from resplit.control.recovery import Recovery
from resplit.decide import Decision
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import ResplitError
from resplit.model.source import StoredModel
from resplit.pass_times import PassTime, TimeByNode
from resplit.process.cancellation import VitalTasks
from resplit.security.identity import Member
from resplit.shards.keyring import Keyring
from resplit.wire.addresses import Address
from resplit.wire.peers import Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
_Work = Callable[[], Coroutine[Any, Any, None]]


class Controller:
    """Owns the parts and their vital `tasks`, and passes events on to them. `state` is the folder of its files."""

    def __init__(
        self,
        cluster: ClusterConfig,
        model: StoredModel,
        member: Member,
        keyring: Keyring,
        log: EpochLog,
        peers: Mapping[str, Peer],
        addresses: dict[str, Address],
        gateway: Gateway,
        state: Path,
    ) -> None:
        self.log = log
        self.tasks = VitalTasks()
        commands = NodeCommands(model, member, keyring, peers, gateway.suspects)
        self.member = member
        self.view = ClusterView(cluster, model, addresses, gateway)
        self.planner = ControllerPlanner(self.view, state / "latest_problem.json")
        self.deployment = Deployment(self.view, commands, log, self.tasks)
        self.moves = Moves(state / "history.json")
        self.readiness = Readiness(self.view, self.deployment, commands)
        self.planner.after_loss = self.readiness.after_loss
        self.fast_loop = FastLoop(self.view, self.planner, self.deployment, self.readiness, log, self.moves, self.tasks)
        self.recovery = Recovery(self.view, self.deployment, self.planner, log)
        self.membership = Membership(self.view, commands, self.deployment, self.recovery, peers)
        self.deployment.on_outage = self.recover
        outcomes = Outcomes(gateway, log)
        self.deployment.on_live = lambda epoch: self._start(lambda: outcomes.judge(epoch), f"judge epoch {epoch.epoch}")
        self.spent = TimeByNode()  # of all passes so far
        # What is wrong with the emulation of nodes; "" if nothing is.
        self.emulation_warning: Callable[[], str] = lambda: ""

    @property
    def live(self) -> Route | None:
        """The epoch that serves."""
        return self.deployment.live

    async def deploy(self, proposal: Proposal) -> LiveEpoch:
        """Make a placement live, or leave everything as it was; ProposalRefusedError says why.

        It gives way to recoveries and to operators' commands.
        """
        return await self.deployment.deploy(proposal, gives_way=True)

    def decisions(self, since: int) -> list[Decision]:
        """The decisions numbered above `since`. The outcome of a recovery has a summary of how sessions resumed."""
        return [_with_sessions(decision, self.view.gateway) for decision in self.log.decisions(since)]

    async def start(self) -> None:
        """Connect the nodes to one another, and deploy the placement again that was live before a restart."""
        await self.membership.introduce()
        await self.recovery.resume()
        self.tasks.spawn(self.fast_loop.run(), "fast loop")
        self.tasks.spawn(self.readiness.run(), "readiness")

    def passed(self, done: PassTime) -> None:
        """Take the times of a pass."""
        self.spent.add(done)
        self.fast_loop.passed(done)

    def node_lost(self, name: str) -> None:
        """A node is lost: if the live epoch uses it, recover without it."""
        if self.live and name in self.live.placement:
            self.recover()

    def node_found(self, name: str) -> None:
        """A node answers, for the first time or again: bring it up to date."""
        self.recovery.node_returned()
        self.readiness.forget(name)
        if self.membership.introduced and name in self.view.addresses:
            self._start(lambda: self.membership.welcome(name), f"welcome {name}")

    async def stop(self) -> None:
        """Cancel the background tasks."""
        await self.tasks.stop()

    def recover(self) -> asyncio.Task[None]:
        """Begin to restore the service if it is out. While the registry is away, this tries without end."""
        return self._start(self.recovery.restore, "recover")

    def _start(self, work: _Work, name: str) -> asyncio.Task[None]:
        return self.tasks.spawn(_unless_refused(work, name), name)


def _with_sessions(decision: Decision, gateway: Gateway) -> Decision:
    """The decision; if it is a recovery, with a summary of how sessions resumed."""
    outcome = decision.outcome
    if decision.action != RECOVER or outcome is None:
        return decision
    return replace(decision, outcome=replace(outcome, sessions=gateway.recoveries(outcome.deployed)))


async def _unless_refused(work: _Work, name: str) -> None:
    """Do this work. If a node is lost meanwhile, or a disk is full, log that: the next event tries again."""
    try:
        await work()
    except ResplitError as error:
        _log.warning("not completed", task=name, error=str(error))
