"""The life of an epoch, from its proposal to its release (the paper's Reconfiguration Broadcast).

    proposed -> prepared -> committed -> (a later epoch is committed) -> released
    proposed or prepared -> aborted

`control.log` decides which step may follow which. This module writes each step to it first, then sends the commands to
the nodes and has the gateway move its sessions. It does not choose placements.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import structlog

from resplit.cancellation import VitalTasks
from resplit.control.cluster_view import ClusterView
from resplit.control.log import EpochLog
from resplit.control.node_commands import NodeCommands
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import CapacityError, CommandRefusedError, ProposalRefusedError, ResplitError
from resplit.wire.commands import Abort, Clear, Commit, Release
from resplit.wire.peers import Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
# A log restored from a backup lacks far fewer epochs than this. A node that says more lies, and must not use up the
# numbers.
_MAX_LACKING = 1_000_000


class Deployment:
    """The epochs of one cluster. `on_outage` is called when a deployment leaves a live epoch that cannot serve."""

    def __init__(self, view: ClusterView, commands: NodeCommands, log: EpochLog, tasks: VitalTasks) -> None:
        self._view = view
        self._commands = commands
        self._log = log
        self._tasks = tasks
        self._gateway = view.gateway
        self.on_outage: Callable[[], None] = lambda: None
        # The committed epoch that serves: the log's live epoch. None before the first one, and after a restart until
        # an epoch is deployed again.
        self.live: Route | None = None
        # The epochs that went live since the controller started, in order. `live` is the last of them.
        self.history: list[LiveEpoch] = []
        # Why `live` cannot serve although its nodes answer. None whenever an epoch has just gone live.
        self.broken: str | None = None
        # Held while an epoch is proposed or prepared, so that there is at most one such epoch. While it is free, every
        # epoch is committed or aborted, except one whose abort could not be logged. That one is aborted first.
        self._changing = asyncio.Lock()
        # No session uses an epoch before this one, and nodes free the earlier ones. It only rises, up to `live`.
        self._oldest_used = 0
        self._releasing = asyncio.Lock()
        self._settling = asyncio.Event()  # set and replaced whenever a session has left an epoch

    @property
    def live_number(self) -> int:
        """The number of the live epoch; 0 if there is none."""
        return self.live.epoch if self.live else 0

    async def deploy(self, proposal: Proposal, paused: bool = False) -> LiveEpoch:
        """Make a placement live on all nodes, or leave everything as it was.

        Running sessions move at a token boundary. With `paused`, no pass runs until the epoch is live, and then every
        session is in it. Passes are also paused for a staged move: one whose new blocks do not fit beside the old ones.

        Raises ProposalRefusedError if the proposal was planned against an epoch that is no longer live, violates a
        rule, or cannot be prepared on some node.
        """
        async with self._changing:
            self._check(proposal)
            await self._abort_unfinished()
            live = await self._run(proposal, paused)
        if self._view.lost_from(proposal.placement):  # lost while the epoch was being deployed
            self.on_outage()
        return live

    def _check(self, proposal: Proposal) -> None:
        if proposal.based_on != self.live_number:
            raise ProposalRefusedError(
                f"planned against epoch {proposal.based_on}, but {self.live_number} is live; plan again"
            )
        if violation := self._view.rules.violation(proposal.placement):
            raise ProposalRefusedError(violation)

    async def _run(self, proposal: Proposal, paused: bool) -> LiveEpoch:
        """Both phases: prepare on all nodes, then commit. Aborts if any node cannot prepare."""
        started_s, detail = time.monotonic(), asdict(proposal)
        route = Route(self._next_epoch(), proposal.placement, dict(self._view.addresses))
        self._log.append(route.epoch, "proposed", detail)
        async with contextlib.AsyncExitStack() as pause:
            try:
                if paused:
                    await pause.enter_async_context(self._gateway.paused())
                loaded, full = await self._prepare(route, replace_current=proposal.action == RECOVER)
                if full and not paused:
                    await pause.enter_async_context(self._gateway.paused())
                if full:
                    loaded += await self._prepare_staged(route, full)
                elif paused:
                    await self._gateway.move_all(route)
                self._log.append(route.epoch, "prepared", {})
                self._log.append(route.epoch, "committed", detail)
            except BaseException as error:  # also when cancelled: a pending epoch would block every later one
                await self._abort(route.epoch, str(error))
                if proposal.action == RECOVER and self.live:  # its blocks were dropped first
                    self.broken = str(error)
                if isinstance(error, ResplitError):
                    raise ProposalRefusedError(f"epoch {route.epoch} could not be prepared: {error}") from error
                raise
            await self._notify_all(Commit(route.epoch), route.epoch)
            return self._go_live(route, proposal, loaded, time.monotonic() - started_s, staged=bool(full))

    def _next_epoch(self) -> int:
        """A number above all epochs in the log and all that nodes know: the log may be an older copy of itself."""
        logged = self._log.next_epoch()
        numbers = [logged]
        for node, obeyed in self._commands.obeyed_epochs(self._view.reachable).items():
            if obeyed > logged + _MAX_LACKING:
                self._gateway.fault(node, f"it says that it obeyed epoch {obeyed}; the log would be at {logged}")
            else:
                numbers.append(obeyed + 1)
        return max(numbers)

    async def _prepare(self, route: Route, replace_current: bool) -> tuple[list[int], list[str]]:
        """Prepare an epoch on every node. Returns the blocks loaded, and the nodes without room beside the old blocks.

        Nodes without a block of the epoch prepare too: they may have to transfer caches. `replace_current`: the live
        epoch cannot serve any more, so the new blocks need not fit beside it.
        """
        if lost := self._view.lost_from(route.placement):
            raise ProposalRefusedError(f"{', '.join(lost)} cannot be reached")
        commands = {
            name: self._commands.prepare(name, route, self._view.rules, replace_current)
            for name in self._view.reachable
        }
        loaded: list[int] = []
        full: list[str] = []
        for name, answer in (await self._commands.send(commands, route.epoch)).items():
            if isinstance(answer, CommandRefusedError) and answer.reason == "insufficient_memory":
                full.append(name)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                loaded += answer["loaded"]
        return loaded, sorted(full)

    async def _prepare_staged(self, route: Route, nodes: Sequence[str]) -> list[int]:
        """On nodes without room for old and new blocks: drop the old weights, transfer the caches, load the new blocks.

        No pass may run meanwhile. If this fails, the live epoch cannot serve any more: `on_outage` is called, and
        sessions are replayed in the epoch that replaces it. Returns the blocks loaded.
        """
        _log.info(
            "a staged move begins: new blocks do not fit beside the old ones", nodes=", ".join(nodes), epoch=route.epoch
        )
        try:
            await self._commands.require(dict.fromkeys(nodes, Clear(route)), route.epoch)
            await self._gateway.move_all(route)
            commands = {name: self._commands.prepare(name, route, self._view.rules, True) for name in nodes}
            replies = await self._commands.require(commands, route.epoch)
        except BaseException as error:
            self.broken = f"a staged move failed: {error}"
            self.on_outage()
            raise
        return [block for reply in replies.values() for block in reply["loaded"]]

    async def abort_unfinished(self) -> None:
        """Abort the epoch that an earlier controller left proposed or prepared, if there is one."""
        async with self._changing:
            await self._abort_unfinished()

    async def _abort_unfinished(self) -> None:
        for epoch in self._log.unfinished():
            await self._abort(epoch, "the controller ended, or could not write, before it was prepared")

    async def _abort(self, epoch: int, reason: str) -> None:
        _log.warning("epoch is aborted", epoch=epoch, reason=reason)
        with contextlib.suppress(CapacityError):  # a full disk: it is aborted before the next one is proposed
            self._log.append(epoch, "aborted", {"reason": reason})
        await self._notify_all(Abort(epoch), epoch)

    def _go_live(
        self, route: Route, proposal: Proposal, loaded: Sequence[int], prepare_s: float, staged: bool
    ) -> LiveEpoch:
        self.live, self.broken = route, None
        self._gateway.set_available()
        self._gateway.activate(route)
        live = LiveEpoch(
            epoch=route.epoch,
            committed_s=time.time(),
            action=proposal.action,
            placement=proposal.placement,
            predicted_latency_s=proposal.predicted_latency_s,
            lower_bound=proposal.lower_bound,
            loaded_bytes=float(sum(self._view.rules.features[block].weight_bytes for block in loaded)),
            prepare_s=prepare_s,
            staged=staged,
        )
        self.history.append(live)
        _log.info("epoch is live", epoch=route.epoch, action=proposal.action, prepare_s=round(prepare_s, 2))
        self.sessions_left(self._gateway.oldest_epoch())
        return live

    def sessions_left(self, oldest: int) -> None:
        """No session uses an epoch before `oldest` any more: release the earlier epochs, in the background."""
        self._settling.set()
        self._settling = asyncio.Event()
        if self._oldest_used < oldest <= self.live_number:
            self._oldest_used = oldest
            self._tasks.spawn(self._release(oldest), "release")

    async def settle(self) -> None:
        """Wait until every session is in the live epoch and the nodes have released the earlier ones."""
        while self._gateway.oldest_epoch() < self.live_number:
            await self._settling.wait()
        await self._release(self.live_number)

    async def _release(self, oldest: int) -> None:
        async with self._releasing:
            await self._notify_all(Release(oldest), oldest)
            with contextlib.suppress(CapacityError):  # a full disk: the next release writes it
                for epoch in self._log.unreleased():
                    if epoch < oldest:
                        self._log.append(epoch, "released", {})

    async def resync(self, name: str, peer: Peer) -> bool:
        """Send a node again the commit, abort or release that it may have missed. Returns whether it is up to date.

        It is if it serves the live epoch, should it be part of it, and no later one.
        """
        async with self._changing:
            report, _ = await peer.report(0)
            for epoch in report.state.prepared:
                outcome = Commit(epoch) if epoch == self.live_number else Abort(epoch)
                await self._commands.notify({name: outcome}, epoch)
            await self._commands.notify({name: Release(self._oldest_used)}, self.live_number)
        report, _ = await peer.report(0)
        served, live = report.state.epochs, self.live
        hosts = live is not None and name in live.placement
        return max(served, default=0) <= self.live_number and (not hosts or self.live_number in served)

    async def _notify_all(self, command: Commit | Abort | Release, epoch: int) -> None:
        await self._commands.notify(dict.fromkeys(self._view.reachable, command), epoch)
