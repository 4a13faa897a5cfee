"""The life of an epoch, from its proposal to its release (the paper's Reconfiguration Broadcast).

    proposed -> prepared -> committed -> (a later epoch is committed) -> released
    proposed or prepared -> aborted

`control.log` decides which step may follow which. This module writes each step to it first, then sends the commands to
the nodes and has the gateway move its sessions. It does not choose placements.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import TypeVar

import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.log import Aborted, EpochLog
from resplit.control.node_commands import NodeCommands
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import CapacityError, CommandRefusedError, NodeLostError, ProposalRefusedError, ResplitError
from resplit.process.cancellation import VitalTasks
from resplit.wire.commands import Abort, Clear, Commit, NodeCommand, Recall, Release, Reply
from resplit.wire.peers import Peer
from resplit.wire.routes import Route

_Answer = TypeVar("_Answer")
_log = structlog.get_logger(__name__)
# A log restored from a backup lacks far fewer epochs than this. A node that says more lies, and must not use up the
# numbers.
_MAX_LACKING = 1_000_000
# Nodes that host no block of a new epoch need not have heard of it before it goes live. They are waited for a moment:
# one that has caches to transfer can do so at once if it knows where the new hosts are.
_OTHERS_ANSWER_WITHIN_S = 1.0
# A node that still carries out an earlier command, or hangs in it, is not waited for until that ends.
_ANSWER_WITHIN_S = 10.0
# A node that lost its trust must prepare in this time. If it does not, the next plan does without it.
_SUSPECTS_WITHIN_S = 10.0
# How long before its time a proposal may come: its sender waits for the answer.
_MOST_AHEAD_S = 100.0


class Deployment:
    """The epochs of one cluster. `on_outage` is called when a deployment leaves a live epoch that cannot serve.

    `on_live` is called with each epoch that goes live.
    """

    def __init__(self, view: ClusterView, commands: NodeCommands, log: EpochLog, tasks: VitalTasks) -> None:
        self._view = view
        self._commands = commands
        self._log = log
        self._tasks = tasks
        self._gateway = view.gateway
        self.on_outage: Callable[[], object] = lambda: None
        self.on_live: Callable[[LiveEpoch], object] = lambda epoch: None
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
        # The scope in which nodes prepare an epoch that gives way to others; None while they do not.
        self._giving_way: asyncio.Timeout | None = None
        # No session uses an epoch before this one, and nodes free the earlier ones. It only rises, up to `live`.
        self._oldest_used = 0
        self._releasing = asyncio.Lock()
        self._settling = asyncio.Event()  # set and replaced whenever a session has left an epoch
        self._disturbed_until_s = -math.inf  # when an epoch was last prepared; monotonic clock

    @property
    def live_number(self) -> int:
        """The number of the live epoch; 0 if there is none."""
        return self.live.epoch if self.live else 0

    @property
    def disturbed_until_s(self) -> float:
        """Until when passes and messages were delayed because an epoch was prepared; inf while one is."""
        return math.inf if self._changing.locked() else self._disturbed_until_s

    async def deploy(self, proposal: Proposal, suspects: Collection[str] = (), gives_way: bool = False) -> LiveEpoch:
        """Make a placement live on all nodes, or leave everything as it was.

        Running sessions move at a token boundary. Passes are paused for a staged move: one whose new blocks do not fit
        beside the old ones. `suspects` get little time to answer. A proposal that `gives_way` is refused if another
        one, which does not, comes while nodes load its blocks: a node may take long for that.

        Raises ProposalRefusedError if the proposal was planned against an epoch that is no longer live, violates a
        rule, or cannot be prepared on some node of the placement. No other node has a say.
        """
        if not gives_way and proposal.not_before_s is None:
            self.interrupt()
        async with self._changing:
            self._check(proposal)
            try:
                await self._abort_unfinished()
                live = await self._run(proposal, suspects, gives_way or proposal.not_before_s is not None)
            finally:
                self._disturbed_until_s = time.monotonic()
        # A node may be lost, or lose its trust, while the epoch goes live.
        if self._view.lost_from(proposal.placement) or self._view.rules.privacy_violation(proposal.placement):
            self.on_outage()
        return live

    async def replaced(self, epoch: int) -> bool:
        """Wait until no epoch is prepared. Returns whether another one than `epoch` is live then."""
        async with self._changing:
            return self.live_number != epoch

    def interrupt(self) -> None:
        """Refuse the epoch that nodes prepare, if it gives way to others."""
        if self._giving_way:
            self._giving_way.reschedule(asyncio.get_running_loop().time())
            self._giving_way = None  # a scope can be ended once only

    def _check(self, proposal: Proposal) -> None:
        if proposal.based_on != self.live_number:
            raise ProposalRefusedError(
                f"planned against epoch {proposal.based_on}, but {self.live_number} is live; plan again"
            )
        if proposal.not_before_s is not None and proposal.not_before_s > time.time() + _MOST_AHEAD_S:
            raise ProposalRefusedError(
                f"it comes more than {_MOST_AHEAD_S:.0f} s before it may go live; propose it later"
            )
        self._ensure_allowed(proposal.placement)

    def _ensure_allowed(self, placement: tuple[str, ...]) -> None:
        """ProposalRefusedError for a placement that violates a rule. Rules may change while an epoch is prepared."""
        if violation := self._view.rules.violation(placement):
            raise ProposalRefusedError(violation)

    async def _run(self, proposal: Proposal, suspects: Collection[str], gives_way: bool) -> LiveEpoch:
        """Both phases: prepare on all nodes, then commit. Aborts if a node of the placement cannot prepare."""
        started_s = time.monotonic()
        route = Route(self._next_epoch(), proposal.placement, dict(self._view.addresses))
        self._log.append(route.epoch, "proposed", proposal)
        async with contextlib.AsyncExitStack() as pause:
            try:
                preparing = self._prepare(route, proposal.action == RECOVER, suspects)
                loaded, full = await (self._unless_others_come(preparing) if gives_way else preparing)
                waited_s = await self._wait_for(proposal)
                if full:
                    await pause.enter_async_context(self._paused(route.epoch))
                    loaded += await self._prepare_staged(route, full)
                self._log.append(route.epoch, "prepared")
                self._log.append(route.epoch, "committed", proposal)
            except BaseException as error:  # also when cancelled: a pending epoch would block every later one
                await self._abort(route.epoch, str(error))
                if proposal.action == RECOVER and self.live:  # its blocks were dropped first
                    self.broken = str(error)
                if isinstance(error, ResplitError):
                    refused_by = error.refused_by if isinstance(error, ProposalRefusedError) else frozenset()
                    why = f"epoch {route.epoch} could not be prepared: {error}"
                    raise ProposalRefusedError(why, refused_by) from error
                raise
            await self._commit(route)
            prepare_s = time.monotonic() - started_s - waited_s
            return self._go_live(route, proposal, loaded, prepare_s, staged=bool(full))

    @contextlib.asynccontextmanager
    async def _paused(self, epoch: int) -> AsyncIterator[None]:
        """A context in which no pass is under way. Passes that have not begun are given back before `epoch`.

        They wait where it is slow, often at the node that is the reason for the move.
        """
        hosts = self.live.placement if self.live else ()
        self._tasks.spawn(self._recall(hosts, epoch), "recall passes")  # begins once passes are paused
        async with self._gateway.paused():
            yield

    def _next_epoch(self) -> int:
        """A number above all epochs in the log and all that nodes know: the log may be an older copy of itself."""
        logged = self._log.next_epoch()
        numbers = [logged]
        for node, obeyed in self._commands.obeyed_epochs(self._view.reachable).items():
            if obeyed > logged + _MAX_LACKING:
                self._commands.fault(node, f"it says that it obeyed epoch {obeyed}; the log would be at {logged}")
            else:
                numbers.append(obeyed + 1)
        return max(numbers)

    async def _prepare(
        self, route: Route, replace_current: bool, suspects: Collection[str]
    ) -> tuple[list[int], list[str]]:
        """Prepare an epoch on every node. Returns the blocks loaded, and the hosts without room beside the old blocks.

        Nodes without a block of the epoch prepare too, because they may have to transfer caches; but they have no say.
        `replace_current`: the live epoch cannot serve any more, so the new blocks need not fit beside it.
        """
        if lost := self._view.lost_from(route.placement):
            raise ProposalRefusedError(f"{', '.join(lost)} cannot be reached", frozenset(lost))
        commands = {
            name: self._commands.prepare(name, route, self._view.rules, replace_current)
            for name in self._view.reachable
        }
        answers = await self._send(commands, route, dict.fromkeys(suspects, _SUSPECTS_WITHIN_S))
        full = sorted(node for node, answer in answers.items() if _is_full(answer))
        replies = _accepted({node: answer for node, answer in answers.items() if node not in full})
        self._ensure_allowed(route.placement)
        return _loaded(replies, route), full

    async def _wait_for(self, proposal: Proposal) -> float:
        """Wait until a prepared proposal may go live, unless others come. Returns the seconds."""
        if proposal.not_before_s is None:
            return 0.0
        begun_s = time.monotonic()
        await self._unless_others_come(asyncio.sleep(max(0.0, proposal.not_before_s - time.time())))
        self._ensure_allowed(proposal.placement)
        return time.monotonic() - begun_s

    async def _unless_others_come(self, preparing: Awaitable[_Answer]) -> _Answer:
        try:
            async with asyncio.timeout(None) as self._giving_way:
                return await preparing
        except TimeoutError:
            raise ProposalRefusedError("a change that could not wait came meanwhile; plan again") from None
        finally:
            self._giving_way = None

    async def _send(
        self, commands: Mapping[str, NodeCommand], route: Route, within_s: Mapping[str, float] | None = None
    ) -> dict[str, Reply | BaseException]:
        """Send commands. Returns the answers of the nodes that host a block of `route`; the others have no say."""
        hosts = {node: command for node, command in commands.items() if node in route.placement}
        others = {node: command for node, command in commands.items() if node not in hosts}
        answers, _ = await asyncio.gather(
            self._commands.send(hosts, route.epoch, within_s), self._tell(others, route.epoch, _OTHERS_ANSWER_WITHIN_S)
        )
        return answers

    async def tell(self, commands: Mapping[str, NodeCommand], epoch: int) -> list[str]:
        """Send commands to nodes that have no say. Returns those that have not answered within 10 s.

        One that is busy with an earlier command gets its own after that.
        """
        return await self._tell(commands, epoch, _ANSWER_WITHIN_S)

    async def _tell(self, commands: Mapping[str, NodeCommand], epoch: int, within_s: float) -> list[str]:
        telling = {
            node: self._tasks.spawn(self._commands.notify({node: command}, epoch), f"{command.kind} to {node}")
            for node, command in commands.items()
        }
        if telling:
            await asyncio.wait(telling.values(), timeout=within_s)
        return [node for node, task in telling.items() if not task.done()]

    async def _commit(self, route: Route) -> None:
        """Have all nodes serve an epoch. A host that refuses is faulty: it has just prepared the epoch."""
        commands = dict.fromkeys(self._view.reachable, Commit(route.epoch))
        for node, answer in (await self._send(commands, route)).items():
            if isinstance(answer, BaseException) and not isinstance(answer, ResplitError):
                raise answer
            if isinstance(answer, ResplitError) and not isinstance(answer, NodeLostError):
                self._commands.fault(node, f"it does not serve epoch {route.epoch}, which it prepared: {answer}")

    async def _prepare_staged(self, route: Route, nodes: Sequence[str]) -> list[int]:
        """On nodes without room for old and new blocks: drop the old weights, transfer the caches, load the new blocks.

        No pass may run meanwhile. If this fails, the live epoch cannot serve any more: `on_outage` is called, and
        sessions are replayed in the epoch that replaces it. Returns the blocks loaded.
        """
        _log.info(
            "a staged move begins: new blocks do not fit beside the old ones", nodes=", ".join(nodes), epoch=route.epoch
        )
        try:
            _accepted(await self._commands.send(dict.fromkeys(nodes, Clear(route)), route.epoch))
            await self._gateway.move_all(route)
            commands = {name: self._commands.prepare(name, route, self._view.rules, True) for name in nodes}
            replies = _accepted(await self._commands.send(commands, route.epoch))
            self._ensure_allowed(route.placement)
        except BaseException as error:
            self.broken = f"a staged move failed: {error}"
            self.on_outage()
            raise
        return _loaded(replies, route)

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
            self._log.append(epoch, "aborted", Aborted(reason))
        await self._tell(dict.fromkeys(self._view.reachable, Abort(epoch)), epoch, _OTHERS_ANSWER_WITHIN_S)

    def _go_live(
        self, route: Route, proposal: Proposal, loaded: Sequence[int], prepare_s: float, staged: bool
    ) -> LiveEpoch:
        weights = [block.weight_bytes for block in self._view.rules.features]
        before = self.live.placement if self.live else route.placement
        ready = {block for block, host in enumerate(route.placement) if host != before[block]}.difference(loaded)
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
            loaded_bytes=float(sum(weights[block] for block in loaded)),
            longest_load_bytes=float(
                max(
                    sum(weights[block] for block in loaded if route.placement[block] == node)
                    for node in set(route.placement)
                )
            ),
            ready_bytes=float(sum(weights[block] for block in ready)),
            prepare_s=prepare_s,
            staged=staged,
            note=proposal.note,
        )
        self.history.append(live)
        _log.info("epoch is live", epoch=route.epoch, action=proposal.action, prepare_s=round(prepare_s, 2))
        if live.note:
            _log.warning("the nodes cannot serve the whole demand within their ceilings", note=live.note)
        self.on_live(live)
        self.sessions_left(self._gateway.oldest_epoch())
        return live

    async def recall(self, nodes: Collection[str]) -> None:
        """Have these nodes give back the passes of earlier epochs that have not begun: they take the live route."""
        await self._recall(nodes, self.live_number)

    async def _recall(self, nodes: Collection[str], epoch: int) -> None:
        await self.tell({node: Recall(epoch) for node in self._view.reachable if node in nodes}, epoch)

    def sessions_left(self, oldest: int) -> None:
        """No session uses an epoch before `oldest` any more: release the earlier epochs, in the background."""
        self._settling.set()
        self._settling = asyncio.Event()
        if self._oldest_used < oldest <= self.live_number:
            self._oldest_used = oldest
            self._tasks.spawn(self._release(oldest), "release")

    async def settle(self, within_s: float) -> bool:
        """Wait until every session is in the live epoch, for `within_s` at most. Returns whether that is so.

        If so, the nodes have released the earlier epochs.
        """
        try:
            async with asyncio.timeout(within_s):
                while self._gateway.oldest_epoch() < self.live_number:
                    await self._settling.wait()
        except TimeoutError:
            return False
        await self._release(self.live_number)
        return True

    async def _release(self, oldest: int) -> None:
        async with self._releasing:
            await self.tell(dict.fromkeys(self._view.reachable, Release(oldest)), oldest)
            with contextlib.suppress(CapacityError):  # a full disk: the next release writes it
                for epoch in self._log.unreleased():
                    if epoch < oldest:
                        self._log.append(epoch, "released")

    async def resync(self, name: str, peer: Peer) -> bool:
        """Send a node again the commit, abort or release that it may have missed. Returns whether it is up to date.

        It is if it serves the live epoch and no later one. A node that hosts no block of it may still get caches to
        keep, so it prepares the epoch too; what it says changes nothing.
        """
        report, _ = await peer.report(0)
        epochs = self._log.epochs
        for epoch in set(report.state.prepared) - {epochs.pending}:
            # By the log: an epoch is committed there before it is live here, and its own commit may be on its way.
            outcome = Commit(epoch) if epoch == epochs.live else Abort(epoch)
            await self._commands.notify({name: outcome}, epoch)
        await self._commands.notify({name: Release(self._oldest_used)}, self.live_number)
        async with self._changing:  # only until it is known what is live: the node must not hold up other epochs
            live = self.live
        if live is None:
            return True
        report, _ = await peer.report(0)
        if self.live is not live or max(report.state.epochs, default=0) == live.epoch:
            return True
        if name not in live.placement:
            route = Route(live.epoch, live.placement, dict(self._view.addresses))
            prepare = self._commands.prepare(name, route, self._view.rules, replace_current=False)
            await self._commands.notify({name: prepare}, live.epoch)
            await self._commands.notify({name: Commit(live.epoch)}, live.epoch)
        return name not in live.placement


def _is_full(answer: Reply | BaseException) -> bool:
    """Whether a node has room for its new blocks, but not beside the old ones."""
    return isinstance(answer, CommandRefusedError) and answer.reason == "insufficient_memory"


def _accepted(answers: Mapping[str, Reply | BaseException]) -> dict[str, Reply]:
    """The replies, if all nodes carried out their command; ProposalRefusedError names those that did not."""
    refusals = {node: answer for node, answer in answers.items() if isinstance(answer, BaseException)}
    for answer in refusals.values():
        if not isinstance(answer, ResplitError):
            raise answer
    if refusals:
        raise ProposalRefusedError(str(next(iter(refusals.values()))), frozenset(refusals))
    return {node: answer for node, answer in answers.items() if not isinstance(answer, BaseException)}


def _loaded(replies: Mapping[str, Reply], route: Route) -> list[int]:
    """The blocks of a route that its hosts say they loaded."""
    return [
        block for node, reply in replies.items() for block in route.blocks_of(node) if block in reply.get("loaded", ())
    ]
