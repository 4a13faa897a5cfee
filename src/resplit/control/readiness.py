"""Prepares for likely changes: plans for them, and has nodes keep the blocks of these plans.

While nothing else is decided, a plan is made for one likely change after another (`control.ready_plans`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.idle_planner import IdlePlanner
from resplit.control.node_commands import NodeCommands
from resplit.control.ready_plans import REST, ReadyPlans
from resplit.decide import Ready
from resplit.errors import ResplitError
from resplit.status import ReadinessStatus
from resplit.types import Problem

_log = structlog.get_logger(__name__)


class Readiness:
    """Keeps one cluster ready. `pose` gives the present problem; `standby` the blocks that stand by, by node."""

    def __init__(self, view: ClusterView, deployment: Deployment, commands: NodeCommands) -> None:
        self._view = view
        self._deployment = deployment
        self._commands = commands
        self.planner = IdlePlanner()
        self._plans = ReadyPlans()
        self._told: dict[str, tuple[int, ...]] = {}  # by node
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.pose: Callable[[], Problem | None] = lambda: None
        self.standby: Callable[[], Mapping[str, Sequence[int]]] = dict

    def look(self) -> None:
        """Check whether new plans are needed: the live epoch or the state of the cluster may have changed."""
        self._wake.set()

    def set_idle(self, idle: bool) -> None:
        """Say whether nothing else is being decided now. Plans are begun only then."""
        (self._idle.set if idle else self._idle.clear)()

    def forget(self, node: str) -> None:
        """A node answers again. It may have lost its stand-by blocks, so it is told again what to keep."""
        self._told.pop(node, None)
        self.look()

    def ready(self) -> Ready:
        """What is ready for a move away from the live epoch, under the present rules."""
        return self._plans.ready(self._deployment.live_number, self._view.rules, self.standby())

    def after_loss(self, epoch: int, lost: Sequence[str]) -> tuple[str, ...] | None:
        """The placement that was planned for the loss of this node in the live epoch; None if there is none."""
        if epoch != self._deployment.live_number:
            return None
        return self._plans.after_loss(epoch, lost, self._view.rules)

    def status(self) -> ReadinessStatus:
        """What is ready, and what that has cost here."""
        return ReadinessStatus(self._plans.changes, len(self._plans.left), self.planner.processor_s)

    async def run(self) -> None:
        """Plan ahead, until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    self._renew()
                    if self._told:  # a node that answers again has forgotten it, and there may be nothing left to plan
                        await self._idle.wait()
                        await self._tell()
                    while self._plans.left:
                        await self._plan_next()
                except ResplitError as error:
                    _log.info("nothing is planned ahead", reason=str(error))
        finally:
            await self.planner.stop()

    def _renew(self) -> None:
        """Begin anew if the plans are too old, or for an epoch that is no longer live."""
        live, now_s = self._deployment.live, time.monotonic()
        if live is None or not self._plans.are_due(live.epoch, now_s):
            return
        problem = self.pose()
        if problem is not None and problem.current == live.placement:
            self._plans.begin(live.epoch, problem, self._previous(), now_s)

    async def _plan_next(self) -> None:
        await self._idle.wait()
        change, begun_s = self._plans.left.pop(0), time.monotonic()
        self._plans.note(change, await self.planner.plan(change.problem))
        self._renew()
        await self._tell()
        await asyncio.sleep(REST * (time.monotonic() - begun_s))

    def _previous(self) -> tuple[str, ...] | None:
        history = self._deployment.history
        return history[-2].placement if len(history) > 1 else None

    async def _tell(self) -> None:
        """Tell each node which blocks to keep ready: first those that it hosts, then those of each plan."""
        live = self._deployment.live
        if live is None:
            return
        rules = self._view.rules
        wanted = {name: self._plans.wanted(name, live.epoch, live.placement, rules) for name in self._view.reachable}
        changed = {name: blocks for name, blocks in wanted.items() if self._told.get(name) != blocks}
        if not changed:
            return
        commands = {name: self._commands.standby(name, blocks, rules) for name, blocks in changed.items()}
        for name, answer in (await self._commands.send(commands, live.epoch)).items():
            if isinstance(answer, ResplitError):
                _log.info("a node keeps nothing ready", node=name, reason=str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._told[name] = changed[name]
