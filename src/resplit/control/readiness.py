"""Prepares for likely changes: plans for them, and has nodes keep the blocks of these plans.

While nothing else is decided, a plan is made for one likely change after another (`decide.likely`). The plans are for
one live epoch, and are made again after a while, because the state of the cluster drifts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.idle_planner import IdlePlanner
from resplit.control.node_commands import NodeCommands
from resplit.decide import Ready
from resplit.decide.likely import LikelyChange, likely_changes
from resplit.errors import ResplitError
from resplit.status import ReadinessStatus
from resplit.types import Problem

_log = structlog.get_logger(__name__)
_KEEP_FOR_S = 30.0
# A plan takes so many times its own time until the next one begins: planning ahead is not urgent.
_REST = 1.0


@dataclass
class ReadyPlans:
    """The plans for one live epoch, by the change in words, and the changes that are still to be planned for."""

    epoch: int
    made_s: float  # monotonic clock
    placements: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left: list[LikelyChange] = field(default_factory=list)
    lost: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by the node that is lost


class Readiness:
    """Keeps one cluster ready. `pose` gives the present problem; `standby` the blocks that stand by, by node."""

    def __init__(self, view: ClusterView, deployment: Deployment, commands: NodeCommands) -> None:
        self._view = view
        self._deployment = deployment
        self._commands = commands
        self.planner = IdlePlanner()
        self._plans = ReadyPlans(0, 0.0)
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
        loaded = {(block, node) for node, blocks in self.standby().items() for block in blocks}
        return Ready(tuple(dict.fromkeys(self._lawful())), frozenset(loaded))

    def after_loss(self, epoch: int, lost: Sequence[str]) -> tuple[str, ...] | None:
        """The placement that was planned for the loss of this node in the live epoch; None if there is none."""
        placement = self._plans.lost.get(lost[0]) if len(lost) == 1 and epoch == self._plans.epoch else None
        return placement if placement in self._lawful() else None

    def status(self) -> ReadinessStatus:
        """What is ready, and what that has cost here."""
        return ReadinessStatus(tuple(self._plans.placements), len(self._plans.left), self.planner.processor_s)

    async def run(self) -> None:
        """Plan ahead, until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    self._renew()
                    while self._plans.left:
                        await self._plan_next()
                except ResplitError as error:
                    _log.info("nothing is planned ahead", reason=str(error))
        finally:
            await self.planner.stop()

    def _renew(self) -> None:
        """Begin anew if the plans are too old, or for an epoch that is no longer live."""
        live, now_s = self._deployment.live, time.monotonic()
        if live is None or (self._plans.epoch == live.epoch and now_s < self._plans.made_s + _KEEP_FOR_S):
            return
        problem = self.pose()
        if problem is None or problem.current != live.placement:
            return
        before = self._plans if self._plans.epoch == live.epoch else None
        self._plans = ReadyPlans(live.epoch, now_s, left=likely_changes(problem))
        if before:  # until they are replaced
            self._plans.placements, self._plans.lost = before.placements, before.lost
        elif back := self._previous():
            self._plans.placements["the way back"] = back

    async def _plan_next(self) -> None:
        plans = self._plans
        await self._idle.wait()
        change, begun_s = plans.left.pop(0), time.monotonic()
        placement = await self.planner.plan(change.problem)
        if placement is not None and placement != change.problem.current:
            plans.placements[change.words] = placement
            if change.lost:
                plans.lost[change.lost] = placement
        self._renew()
        if plans is self._plans:
            await self._tell()
            await asyncio.sleep(_REST * (time.monotonic() - begun_s))

    def _previous(self) -> tuple[str, ...] | None:
        history = self._deployment.history
        return history[-2].placement if len(history) > 1 else None

    def _lawful(self) -> list[tuple[str, ...]]:
        """The placements for the live epoch that keep the rules."""
        if self._plans.epoch != self._deployment.live_number:
            return []
        rules = self._view.rules
        return [each for each in self._plans.placements.values() if not rules.violation(each)]

    async def _tell(self) -> None:
        """Tell each node which blocks to keep ready: first those that it hosts, then those of each plan."""
        live = self._deployment.live
        if live is None:
            return
        wanted = {name: self._wanted(name, live.placement) for name in self._view.reachable}
        changed = {name: blocks for name, blocks in wanted.items() if self._told.get(name) != blocks}
        if not changed:
            return
        commands = {name: self._commands.standby(name, blocks, self._view.rules) for name, blocks in changed.items()}
        for name, answer in (await self._commands.send(commands, live.epoch)).items():
            if isinstance(answer, ResplitError):
                _log.info("a node keeps nothing ready", node=name, reason=str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._told[name] = changed[name]

    def _wanted(self, node: str, live: tuple[str, ...]) -> tuple[int, ...]:
        """The blocks that a node should keep ready, the most wanted first."""
        rules = self._view.rules
        if node in rules.drained:
            return ()
        trusted = node in self._view.cluster.trusted
        blocks = dict.fromkeys(
            block for placement in (live, *self._lawful()) for block, host in enumerate(placement) if host == node
        )
        return tuple(block for block in blocks if trusted or block not in rules.private)
