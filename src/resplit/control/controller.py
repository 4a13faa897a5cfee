"""The controller: it alone writes epochs. Checks a proposed placement, prepares it, commits it, releases the old one.

Decides no placements and serves no requests. Each step of an epoch stands in the log before it is acted on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from resplit.cancellation import cancel_and_wait
from resplit.config import ClusterConfig
from resplit.control.gateway import Gateway
from resplit.control.log import EpochLog
from resplit.control.node_commands import NodeCommands
from resplit.control.recovery import load_problem, plan_without, save_problem, under_rules
from resplit.control.rules import PlacementRules
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import CapacityError, CommandRefusedError, ConfigError, ProposalRefusedError, ResplitError
from resplit.model.source import StoredModel
from resplit.security.identity import Member
from resplit.shards.keyring import Keyring
from resplit.types import BlockFeatures, Problem
from resplit.wire.commands import Abort, Clear, Commit, Connect, Emulate, Release
from resplit.wire.peers import Address, Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
_RESUME_TRIES = 3  # a plan may be outdated by the next loss
# A recovery that is refused, for the next loss, a full disk or a registry that is gone, is tried again at this pace;
# requests are told once that has gone on for so long.
_TRY_AGAIN_S = 0.25
_TELL_AFTER_S = 5.0
_HOPE_S = 2.0  # a node that was only busy, or whose link dropped, answers again within it


@dataclass
class Controller:
    """Epochs of one cluster."""

    cluster: ClusterConfig
    model: StoredModel
    member: Member
    keyring: Keyring
    log: EpochLog
    peers: Mapping[str, Peer]
    addresses: dict[str, Address]
    gateway: Gateway
    problem_file: Path  # of the newest problem that it was given, for plans of its own
    epochs: list[LiveEpoch] = field(default_factory=list)
    live: Route | None = None

    def __post_init__(self) -> None:
        self.rules = PlacementRules.of(self.cluster, self.model)
        self.commands = NodeCommands(self.model, self.member, self.keyring, self.peers)
        self._latest_problem = load_problem(self.problem_file)
        self._changing = asyncio.Lock()
        self._recovering = asyncio.Lock()
        self._releasing = asyncio.Lock()
        self._settling = asyncio.Event()
        self._found = asyncio.Event()
        self._introduced = False
        self._broken: str | None = None  # why the live epoch cannot serve though all its nodes answer
        self._released = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def features(self) -> tuple[BlockFeatures, ...]:
        """The model's blocks."""
        return self.rules.features

    @property
    def answering(self) -> list[str]:
        """The nodes that answer, in file order."""
        reached = self.gateway.connected_nodes()
        return [name for name in self.addresses if name in reached]

    @property
    def silent(self) -> list[str]:
        """The nodes that do not."""
        return sorted(set(self.addresses) - self.gateway.connected_nodes())

    def adopt(self, cluster: ClusterConfig, drained: frozenset[str], addresses: dict[str, Address]) -> None:
        """Let other rules hold from now on; what is live is not touched, and may break them."""
        self.cluster, self.addresses = cluster, addresses
        self.rules = PlacementRules.of(cluster, self.model, drained)
        self.gateway.reconfigure(cluster, self.rules.features, drained)

    async def introduce(self) -> None:
        """Tell every node that answers where the others listen, and have it measure its links."""
        async with self._changing:
            await self._abort_unfinished()
        self._introduced = True
        await self.commands.notify(self._introductions(self.answering), self._live_number)

    async def resume(self) -> None:
        """After a restart: make what was live before live again, or what can be without nodes that do not answer.

        Where nothing can, requests are told why, and the next node that answers is awaited. Without anything that was
        live before, a first plan is awaited.
        """
        async with self._recovering:
            committed = self.log.last_committed()
            if committed is None or self.live is not None:
                return
            before = tuple(committed[1]["placement"])
            for _ in range(_RESUME_TRIES):
                proposal: Proposal | str = Proposal(before, "resume", 0, committed[1].get("predicted_latency_s"))
                if set(before) - set(self.answering) or self.rules.violation(before):
                    proposal = await self.plan(before, 0)
                if isinstance(proposal, str):
                    reason = proposal
                    break
                try:
                    await self.deploy(proposal)
                except (ProposalRefusedError, CapacityError) as error:
                    reason = str(error)
                else:
                    return
            _log.error("what was live before cannot be resumed", reason=reason)
            self.gateway.set_unavailable(reason)

    async def profile(self, those: Collection[str] | None = None) -> None:
        """Have every node that is in use, or only `those`, time one block of each kind that it may hold."""
        asked = set(self.addresses if those is None else those) - self.rules.drained
        nodes = [name for name in self.answering if name in asked]
        await self.commands.require(
            {name: self.commands.profile(name, self.rules) for name in nodes}, self._live_number
        )

    async def deploy(self, proposal: Proposal, held: bool = False) -> LiveEpoch:
        """Make a placement live on all nodes, or leave everything as it was.

        Running sessions follow at a token boundary of their own. `held`: no pass runs from the first moment on, and all
        sessions have left the old placement at the end. So it is, from when the old blocks are dropped, also where the
        new ones do not fit beside them (a staged move). ProposalRefusedError where it was planned against an epoch
        that is no longer live, breaks a rule, or could not be prepared on some node.
        """
        async with self._changing:
            self._check(proposal)
            await self._abort_unfinished()
            live = await self._deploy(proposal, held)
        if set(proposal.placement) - self.gateway.connected_nodes():  # lost while it was deployed
            self._spawn(self.recover())
        return live

    def set_problem(self, problem: Problem) -> None:
        """Take a problem as the newest problem of the cluster."""
        self._latest_problem = problem
        save_problem(problem, self.problem_file)

    async def emulate(self, node: str, change: Emulate) -> None:
        """Change what an emulated node plays; ConfigError for a node or a link that the cluster does not have."""
        for name in (node, *change.links):
            if name not in self.addresses:
                raise ConfigError(repr(name), f"not in this cluster; it has {', '.join(self.addresses)}")
        if node in change.links:
            raise ConfigError(repr(node), "a link is between two nodes")
        await self.commands.require({node: change}, self._live_number)

    def settled(self, oldest: int) -> None:
        """Sessions use no epoch before `oldest` any more: free what only those held."""
        self._settling.set()
        self._settling = asyncio.Event()
        if self._released < oldest <= self._live_number:
            self._released = oldest
            self._spawn(self._release(oldest))

    async def only_live(self) -> None:
        """Wait until every session is in the live epoch and the nodes have freed what only earlier ones held."""
        while self.gateway.oldest_epoch() < self._live_number:
            await self._settling.wait()
        await self._release(self._live_number)

    def broke(self, reason: str) -> None:
        """What is live cannot serve, though its nodes answer; `recover` is to follow."""
        self._broken = reason

    def node_lost(self, name: str) -> None:
        """A node's connection broke: if it serves, plan and deploy without it."""
        if self.live and name in self.live.placement:
            self._spawn(self.recover())

    def node_found(self, name: str) -> None:
        """A node answers, for the first time or again: introduce it, and let it serve where it should."""
        self._found.set()
        self._found = asyncio.Event()
        if self._introduced and name in self.addresses:
            self._spawn(self._welcome(name))

    async def stop(self) -> None:
        """Cancel what runs on its own."""
        await cancel_and_wait(self._tasks)

    async def recover(self) -> None:
        """Deploy plans for the nodes that are left until what is live can serve, or no plan is possible."""
        async with self._recovering:
            refused_since_s: float | None = None
            while self.live and (why := self._outage_reason()):
                lost, begun_s = self.silent, time.monotonic()
                plan = await self.plan(self.live.placement, self.live.epoch)
                if isinstance(plan, str):
                    if await self._finds_a_node(lost):
                        continue
                    _log.error("no service", reason=plan)
                    self.gateway.set_unavailable(plan)
                    return
                try:
                    live = await self.deploy(plan)
                except (ProposalRefusedError, CapacityError) as error:
                    _log.warning("recovery was refused", error=str(error))
                    refused_since_s = refused_since_s or begun_s
                    if time.monotonic() - refused_since_s > _TELL_AFTER_S:
                        self.gateway.set_unavailable(str(error))
                    await asyncio.sleep(_TRY_AGAIN_S)  # nobody reports that the registry, say, is back
                    continue
                self._log_recovery(f"lost {', '.join(lost)}" if lost else why, begun_s, live)
            self.gateway.set_available()

    async def plan(self, current: tuple[str, ...], based_on: int, action: str = RECOVER) -> Proposal | str:
        """A proposal of its own for the nodes that may be used and answer, or why there is none."""
        lost, latest = self.silent, self._latest_problem
        if latest is None or len(latest.blocks) != len(self.features):
            return f"{', '.join(lost) + ' lost, and ' if lost else ''}nothing known yet to plan with"
        blocks = [feature.block() for feature in self.features]
        problem = under_rules(latest, self.cluster.trusted, blocks)
        removed = {node.name for node in problem.nodes} - set(self.cluster.node_names)
        unused = removed | set(lost) | self.rules.drained
        plan = await asyncio.to_thread(plan_without, problem, unused, current)
        if plan.placement is None or plan.terms is None:
            without = f"without {', '.join(sorted(unused))} " if unused else ""
            return f"{without}there is no placement: {plan.reason}"
        return Proposal(plan.placement, action, based_on, plan.terms.latency_s, plan.lower_bound)

    @property
    def _live_number(self) -> int:
        return self.live.epoch if self.live else 0

    def _outage_reason(self) -> str | None:
        """Why what is live cannot serve; None if it can."""
        assert self.live is not None
        if lost := sorted(set(self.live.placement) - self.gateway.connected_nodes()):
            return f"{', '.join(lost)} lost"
        return self._broken or self.rules.privacy_violation(self.live.placement)

    async def _finds_a_node(self, lost: list[str]) -> bool:
        """Whether not all of these are silent any more, or one answers again before long; requests wait meanwhile."""
        if set(lost) - set(self.silent):
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HOPE_S):
                return await self._found.wait()
        return False

    def _log_recovery(self, reason: str, begun_s: float, live: LiveEpoch) -> None:
        plan_s = time.monotonic() - begun_s - live.prepare_s
        outcome = {"deployed": live.epoch, "plan_s": plan_s, "prepare_s": live.prepare_s}
        with contextlib.suppress(CapacityError):
            self.log.append_decision({"action": RECOVER, "at_s": time.time(), "reason": reason, "outcome": outcome})

    async def _welcome(self, name: str) -> None:
        """Tell a node where the others are; give it its blocks again if the live epoch wants it and it has none."""
        try:
            await self.commands.require(self._introductions([name]), self._live_number)
            await self._resync(name)
            state, _ = await self.peers[name].report(0)
        except ResplitError as error:
            _log.warning("a node came back and was lost again", node=name, error=str(error))
            return
        await self.resume()
        live = self.live
        if live and name in live.placement and live.epoch not in state["state"]["epochs"]:
            with contextlib.suppress(ProposalRefusedError):
                await self.deploy(Proposal(live.placement, RECOVER, live.epoch))
        await self.recover()

    async def _resync(self, name: str) -> None:
        """Tell a node again what it may have missed: that an epoch was committed, aborted or released."""
        async with self._changing:  # so that nothing of it is under way
            state, _ = await self.peers[name].report(0)
            for epoch in state["state"]["prepared"]:
                outcome = Commit(epoch) if epoch == self._live_number else Abort(epoch)
                await self.commands.notify({name: outcome}, epoch)
            await self.commands.notify({name: Release(self._released)}, self._live_number)

    def _introductions(self, nodes: list[str]) -> dict[str, Connect]:
        sessions = self.gateway.session_names()
        return {name: self.commands.connect(name, self.addresses, self.rules, sessions) for name in nodes}

    def _check(self, proposal: Proposal) -> None:
        if proposal.based_on != self._live_number:
            raise ProposalRefusedError(
                f"planned against epoch {proposal.based_on}, but {self._live_number} is live; plan again"
            )
        if broken := self.rules.violation(proposal.placement):
            raise ProposalRefusedError(broken)

    async def _deploy(self, proposal: Proposal, held: bool) -> LiveEpoch:
        epoch, begun_s = self.log.next_epoch(), time.monotonic()
        route, detail = Route(epoch, proposal.placement, dict(self.addresses)), asdict(proposal)
        self.log.append(epoch, "proposed", detail)
        async with contextlib.AsyncExitStack() as holding:
            try:
                if held:
                    await holding.enter_async_context(self.gateway.paused())
                loaded, tight = await self._prepare(route, replace_current=proposal.action == RECOVER)
                if tight and not held:
                    await holding.enter_async_context(self.gateway.paused())
                loaded += await self._prepare_in_stages(route, tight)
                if held and not tight:
                    await self.gateway.move_all(route)
                self.log.append(epoch, "prepared", {})
                self.log.append(epoch, "committed", detail)
            except BaseException as error:  # cancelled too: a pending epoch would block every later one
                await self._abort(epoch, str(error))
                if proposal.action == RECOVER and self.live:  # the old blocks were dropped first
                    self._broken = str(error)
                if isinstance(error, ResplitError):
                    raise ProposalRefusedError(f"epoch {epoch} could not be prepared: {error}") from error
                raise
            await self.commands.notify(dict.fromkeys(self.answering, Commit(epoch)), epoch)
            loaded_bytes = float(sum(self.features[block].weight_bytes for block in loaded))
            return self._went_live(route, proposal, loaded_bytes, time.monotonic() - begun_s, bool(tight))

    async def _prepare(self, route: Route, replace_current: bool) -> tuple[list[int], list[str]]:
        """Prepare an epoch on every node that has the room; the blocks loaded, and the nodes without.

        Nodes that get no block are told too: they may have to hand caches over. `replace_current`: the live epoch
        cannot serve any more, so it need not fit beside it.
        """
        nodes = self.answering
        if lost := sorted(set(route.placement) - set(nodes)):
            raise ProposalRefusedError(f"{', '.join(lost)} cannot be reached")
        commands = {name: self.commands.prepare(name, route, self.rules, replace_current) for name in nodes}
        answers = await self.commands.send(commands, route.epoch)
        loaded: list[int] = []
        tight: list[str] = []
        for name, answer in answers.items():
            if isinstance(answer, CommandRefusedError) and answer.reason == "insufficient_memory":
                tight.append(name)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                loaded += answer["loaded"]
        return loaded, tight

    async def _prepare_in_stages(self, route: Route, tight: Collection[str]) -> list[int]:
        """On nodes without room for old and new, while no pass runs: drop the old weights, move the caches, load.

        If that fails the old placement cannot serve any more; then it is recovered, and sessions are replayed.
        """
        if not tight:
            return []
        nodes = sorted(tight)
        _log.info("a staged move: no room beside the old blocks", nodes=", ".join(nodes), epoch=route.epoch)
        try:
            await self.commands.require(dict.fromkeys(nodes, Clear(route)), route.epoch)
            await self.gateway.move_all(route)
            commands = {name: self.commands.prepare(name, route, self.rules, True) for name in nodes}
            replies = await self.commands.require(commands, route.epoch)
        except BaseException as error:
            self._broken = f"a staged move failed: {error}"
            self._spawn(self.recover())
            raise
        return [block for reply in replies.values() for block in reply["loaded"]]

    async def _abort(self, epoch: int, reason: str) -> None:
        _log.warning("epoch is aborted", epoch=epoch, reason=reason)
        with contextlib.suppress(CapacityError):  # a full disk: it is aborted before the next one is proposed
            self.log.append(epoch, "aborted", {"reason": reason})
        await self.commands.notify(dict.fromkeys(self.answering, Abort(epoch)), epoch)

    async def _abort_unfinished(self) -> None:
        for epoch in self.log.unfinished():
            await self._abort(epoch, "the controller ended, or could not write, before it was prepared")

    def _went_live(
        self, route: Route, proposal: Proposal, loaded_bytes: float, prepare_s: float, staged: bool
    ) -> LiveEpoch:
        self.live, self._broken = route, None
        self.gateway.set_available()
        self.gateway.activate(route)
        went_live = LiveEpoch(
            route.epoch,
            time.time(),
            proposal.action,
            proposal.placement,
            proposal.predicted_latency_s,
            proposal.lower_bound,
            loaded_bytes,
            prepare_s,
            staged,
        )
        self.epochs.append(went_live)
        _log.info("epoch is live", epoch=route.epoch, action=proposal.action, prepare_s=round(prepare_s, 2))
        self.settled(self.gateway.oldest_epoch())
        return went_live

    async def _release(self, oldest: int) -> None:
        async with self._releasing:
            await self.commands.notify(dict.fromkeys(self.answering, Release(oldest)), oldest)
            with contextlib.suppress(CapacityError):  # a full disk: the next release writes it
                for epoch in self.log.unreleased():
                    if epoch < oldest:
                        self.log.append(epoch, "released", {})

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("what the controller did by itself failed", exc_info=error)
