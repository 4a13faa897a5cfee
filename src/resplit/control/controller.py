"""The controller: it alone writes epochs. Checks a proposed placement, prepares it, commits it, releases the old one.

Decides no placements and serves no requests. Each step of an epoch stands in the log before it is acted on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from resplit.config import ClusterConfig
from resplit.control.gateway import Gateway
from resplit.control.keys import Member
from resplit.control.log import EpochLog
from resplit.control.recovery import load_picture, plan_without, save_picture
from resplit.control.signing import CommandSigner
from resplit.errors import ConfigError, NodeLostError, ProposalRefusedError, ResplitError
from resplit.model.registry import Keyring
from resplit.model.shards import wrap_key
from resplit.model.source import StoredModel
from resplit.types import BlockFeatures, Problem
from resplit.wire.peers import Address, Peer
from resplit.wire.route import Route

_log = structlog.get_logger(__name__)
RECOVER = "recover"  # the action of an epoch that comes after a loss: what was live cannot serve
_RECOVERY_TRIES = 3  # a plan may be outdated by the next loss; after so many refusals the next loss or find is awaited


@dataclass(frozen=True)
class Proposal:
    """A placement that somebody wants deployed, and why. `based_on` is the epoch that it was planned against."""

    placement: tuple[str, ...]
    action: str
    based_on: int
    predicted_latency_s: float | None = None
    lower_bound: float | None = None


@dataclass(frozen=True)
class LiveEpoch:
    """One placement that was committed; `committed_s` in seconds since 1970."""

    epoch: int
    committed_s: float
    action: str
    placement: tuple[str, ...]
    predicted_latency_s: float | None
    lower_bound: float | None
    loaded_bytes: float
    prepare_s: float


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
    picture_file: Path  # of the newest problem that it was given, for plans of its own
    epochs: list[LiveEpoch] = field(default_factory=list)
    live: Route | None = None

    def __post_init__(self) -> None:
        self.features: tuple[BlockFeatures, ...] = self.model.features(self.cluster.private_layers)
        self.private = frozenset(index for index, block in enumerate(self.features) if block.private)
        self._problem = load_picture(self.picture_file)
        self._signer = CommandSigner(self.member)
        self._changing = asyncio.Lock()
        self._recovering = asyncio.Lock()
        self._released = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def introduce(self) -> None:
        """Tell every node where the others listen, and have it measure its links; NodeLostError for a silent one."""
        for epoch in self.log.unfinished():
            self.log.append(epoch, "aborted", {"reason": "the controller ended before it was prepared"})
            await self._tell_reachable(self._answering(), "abort", {"epoch": epoch}, epoch)
        await self._tell(self.addresses, "meet", self._introduction)

    async def resume(self) -> None:
        """After a restart: make what was live before live again, in an epoch of its own; else wait for a first plan."""
        committed = self.log.last_committed()
        if committed is None or self.live is not None:
            return
        placement = tuple(committed[1]["placement"])
        try:
            await self.deploy(Proposal(placement, "resume", 0, committed[1].get("predicted_latency_s")))
        except ProposalRefusedError as error:
            _log.warning("what was live before cannot be resumed; a new plan is needed", error=str(error))

    async def profile(self) -> None:
        """Have every node time one block of each kind that it may hold."""
        await self._tell(self.addresses, "profile", self._profile_order)

    async def deploy(self, proposal: Proposal) -> LiveEpoch:
        """Make a placement live on all nodes, or leave everything as it was.

        ProposalRefusedError where it was planned against an epoch that is no longer live, breaks a rule, or could not
        be prepared on some node.
        """
        async with self._changing:
            self._check(proposal)
            epoch = self.log.next_epoch()
            route = Route(epoch, proposal.placement, dict(self.addresses))
            detail = asdict(proposal)
            self.log.append(epoch, "proposed", detail)
            begun_s = time.monotonic()
            loaded = await self._prepare(route, instead=proposal.action == RECOVER)
            self.log.append(epoch, "prepared", {})
            self.log.append(epoch, "committed", detail)
            await self._tell_reachable(self._answering(), "commit", {"epoch": epoch}, epoch)
            live = self._went_live(route, proposal, loaded, time.monotonic() - begun_s)
        if set(proposal.placement) - self.gateway.answering():  # lost while it was deployed
            self._spawn(self._recover())
        return live

    def learn(self, problem: Problem) -> None:
        """Take a problem as the newest picture of the cluster."""
        self._problem = problem
        save_picture(problem, self.picture_file)

    async def emulate(self, node: str, change: dict[str, Any]) -> None:
        """Change what an emulated node plays; ConfigError for a node or a link that the cluster does not have."""
        for name in (node, *change.get("links", {})):
            if name not in self.addresses:
                raise ConfigError(repr(name), f"not in this cluster; it has {', '.join(self.addresses)}")
        if node in change.get("links", {}):
            raise ConfigError(repr(node), "a link is between two nodes")
        await self._tell([node], "emulate", lambda name: change)

    def settled(self, oldest: int) -> None:
        """Sessions use no epoch before `oldest` any more: free what only those held."""
        if self._released < oldest <= (self.live.epoch if self.live else 0):
            self._released = oldest
            self._spawn(self._release(oldest))

    def node_lost(self, name: str) -> None:
        """A node's connection broke: if it serves, plan and deploy without it."""
        if self.live and name in self.live.placement:
            self._spawn(self._recover())

    def node_found(self, name: str) -> None:
        """A node answers, for the first time or again: introduce it, and let it serve where it should."""
        if self.live:
            self._spawn(self._welcome(name))

    async def stop(self) -> None:
        """Cancel what runs on its own."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _recover(self) -> None:
        """Deploy plans for the nodes that are left until the live one has no lost node, or none is possible."""
        async with self._recovering:
            refused = 0
            while self.live and set(self.live.placement) - self.gateway.answering():
                lost = sorted(set(self.addresses) - self.gateway.answering())
                begun_s = time.monotonic()
                plan = await self._plan_without(lost, self.live.placement)
                if isinstance(plan, str):
                    _log.error("no service", reason=plan)
                    self.gateway.give_up(plan)
                    return
                try:
                    live = await self.deploy(replace(plan, based_on=self.live.epoch))
                except (ProposalRefusedError, NodeLostError) as error:
                    refused += 1
                    _log.warning("recovery was refused", times=refused, error=str(error))
                    if refused == _RECOVERY_TRIES:
                        self.gateway.give_up(str(error))
                        return
                    continue
                self._log_recovery(lost, time.monotonic() - begun_s - live.prepare_s, live)
            self.gateway.give_up(None)

    async def _plan_without(self, lost: Sequence[str], current: tuple[str, ...]) -> Proposal | str:
        """A proposal for the nodes that are left, or why there is none."""
        if self._problem is None:
            return f"{', '.join(lost)} lost, and nothing known yet to plan with"
        plan = await asyncio.to_thread(plan_without, self._problem, lost, current)
        if plan.placement is None or plan.terms is None:
            return f"without {', '.join(lost)} there is no placement: {plan.reason}"
        return Proposal(plan.placement, RECOVER, 0, plan.terms.latency_s, plan.lower_bound)

    def _log_recovery(self, lost: Sequence[str], plan_s: float, live: LiveEpoch) -> None:
        outcome = {"deployed": live.epoch, "plan_s": plan_s, "prepare_s": live.prepare_s}
        reason = f"lost {', '.join(lost)}"
        self.log.append_decision({"action": RECOVER, "at_s": time.time(), "reason": reason, "outcome": outcome})

    async def _welcome(self, name: str) -> None:
        """Tell a node where the others are; give it its blocks again if the live epoch wants it and it has none."""
        try:
            await self._tell([name], "meet", self._introduction)
            state, _ = await self.peers[name].report(0)
        except ResplitError as error:
            _log.warning("a node came back and was lost again", node=name, error=str(error))
            return
        live = self.live
        if live and name in live.placement and live.epoch not in state["state"]["epochs"]:
            with contextlib.suppress(ProposalRefusedError):
                await self.deploy(Proposal(live.placement, RECOVER, live.epoch))
        await self._recover()

    def _answering(self) -> list[str]:
        reached = self.gateway.answering()
        return [name for name in self.addresses if name in reached]

    def _check(self, proposal: Proposal) -> None:
        live = self.live.epoch if self.live else 0
        if proposal.based_on != live:
            raise ProposalRefusedError(f"planned against epoch {proposal.based_on}, but {live} is live; plan again")
        if len(proposal.placement) != len(self.features):
            raise ProposalRefusedError(f"{len(proposal.placement)} blocks placed, the model has {len(self.features)}")
        for index, node in enumerate(proposal.placement):
            if node not in self.cluster.node_names:
                raise ProposalRefusedError(f"block {self.features[index].name}: no node is called {node!r}")
            if index in self.private and node not in self.cluster.trusted:
                raise ProposalRefusedError(f"block {self.features[index].name} is private and {node} is not trusted")

    async def _prepare(self, route: Route, instead: bool) -> float:
        """Prepare an epoch on every node; the bytes of weights that were loaded. Aborts it if one fails.

        Nodes that get no block are told too: they may have to hand caches over. `instead` of what is live: that cannot
        serve any more, so it need not fit beside it.
        """
        nodes = self._answering()
        if silent := sorted(set(route.placement) - set(nodes)):
            self.log.append(route.epoch, "aborted", {"reason": "lost nodes"})
            raise ProposalRefusedError(f"{', '.join(silent)} cannot be reached")
        order = self._prepare_order(route, instead)
        try:
            replies = await self._tell(nodes, "prepare", order, route.epoch)
        except BaseException as error:  # cancelled too: a pending epoch would block every later one
            self.log.append(route.epoch, "aborted", {"reason": str(error)})
            await self._tell_reachable(nodes, "abort", {"epoch": route.epoch}, route.epoch)
            if isinstance(error, ResplitError):
                raise ProposalRefusedError(f"epoch {route.epoch} could not be prepared: {error}") from error
            raise
        loaded = [block for reply in replies for block in reply["loaded"]]
        return float(sum(self.features[block].weight_bytes for block in loaded))

    def _went_live(self, route: Route, proposal: Proposal, loaded_bytes: float, prepare_s: float) -> LiveEpoch:
        self.live = route
        self.gateway.flip(route)
        went_live = LiveEpoch(
            route.epoch,
            time.time(),
            proposal.action,
            proposal.placement,
            proposal.predicted_latency_s,
            proposal.lower_bound,
            loaded_bytes,
            prepare_s,
        )
        self.epochs.append(went_live)
        _log.info("epoch is live", epoch=route.epoch, action=proposal.action, prepare_s=round(prepare_s, 2))
        self.settled(self.gateway.oldest_epoch())
        return went_live

    async def _release(self, oldest: int) -> None:
        await self._tell_reachable(self._answering(), "release", {"epoch": oldest}, oldest)
        for epoch in [live.epoch for live in self.epochs if live.epoch < oldest]:
            if self.log.steps(epoch)[-1].step != "released":
                self.log.append(epoch, "released", {})

    async def _tell(
        self,
        nodes: Sequence[str] | Mapping[str, Any],
        kind: str,
        body: Callable[[str], dict[str, Any]],
        epoch: int | None = None,
    ) -> list[dict[str, Any]]:
        """Send a signed command to nodes at once; their answers in order, or the first error once all have answered."""
        about = epoch if epoch is not None else self.live.epoch if self.live else 0
        calls = [
            self.peers[name].command(kind, self._signer.sign(kind, body(name), audience=name, epoch=about))
            for name in nodes
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, dict)]

    async def _tell_reachable(self, nodes: Sequence[str], kind: str, body: dict[str, Any], epoch: int) -> None:
        """Send a command to nodes at once, passing over those that cannot be reached: they hold nothing."""

        async def tell(name: str) -> None:
            try:
                await self._tell([name], kind, lambda _: body, epoch)
            except ResplitError as error:
                level = _log.info if isinstance(error, NodeLostError) else _log.warning
                level("command not obeyed", kind=kind, node=name, error=str(error))

        await asyncio.gather(*(tell(name) for name in nodes))

    def _prepare_order(self, route: Route, instead: bool) -> Callable[[str], dict[str, Any]]:
        def order(node: str) -> dict[str, Any]:
            return {
                "route": route.to_json(),
                "instead": instead,
                "model": self._model_order(),
                "private": sorted(self.private),
                "kv_tokens": self.cluster.kv_tokens,
                "shards": self._shards(node, route.blocks_of(node)),
            }

        return order

    def _profile_order(self, node: str) -> dict[str, Any]:
        """One block of each kind that the node may hold: layers are alike, so one speaks for all."""
        trusted = node in self.cluster.trusted
        first: dict[str, int] = {}
        for index, block in enumerate(self.features):
            if trusted or not block.private:
                first.setdefault(block.kind, index)
        blocks = sorted(first.values())
        shards = self._shards(node, tuple(blocks))
        return {"blocks": blocks, "model": self._model_order(), "private": sorted(self.private), "shards": shards}

    def _introduction(self, node: str) -> dict[str, Any]:
        """Where the others are, and which sessions there are: caches of others are left from another life."""
        addresses = {name: str(address) for name, address in self.addresses.items()}
        return {"addresses": addresses, "sessions": self.gateway.sessions()}

    def _model_order(self) -> dict[str, Any]:
        return asdict(self.model.spec)

    def _shards(self, node: str, blocks: tuple[int, ...]) -> dict[str, dict[str, str]]:
        """For each block its shard's name and the data key, wrapped for this node alone."""
        public = self.member.public_wrap_key(node)
        result = {}
        for block in blocks:
            entry = self.keyring[self.features[block].name]
            wrapped = wrap_key(entry.key, public, node=node, shard=entry.shard)
            result[str(block)] = {"name": entry.shard, "key": wrapped.hex()}
        return result

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
