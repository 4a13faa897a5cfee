"""Commands to nodes: builds the content of each command, signs and sends it, and collects the replies."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import structlog

from resplit.control.load_paces import LoadPaces
from resplit.control.rules import PlacementRules
from resplit.errors import CommandRefusedError, NodeLostError, ResplitError
from resplit.model.source import StoredModel
from resplit.security.identity import Member
from resplit.security.signing import CommandSigner
from resplit.shards.keyring import Keyring
from resplit.shards.sealing import wrap_key
from resplit.types import BlockFeatures
from resplit.wire.addresses import Address
from resplit.wire.commands import Connect, NodeCommand, Prepare, Profile, Reply, Standby, Trust, WrappedShard, to_body
from resplit.wire.emulated_link import Shape
from resplit.wire.peers import Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
# A node that does not answer in time is faulty. Timing blocks (`profile`) and measuring links (`connect`) take longer.
# A node that loads blocks gets more time, by their size.
_ANSWER_WITHIN_S = {"profile": 60.0, "connect": 30.0}
_OTHERWISE_WITHIN_S = 10.0
# Refusals that an honest node gives too: it was absent when an earlier command was sent, or its epoch is later.
_MISSED = ("unprepared", "stale")


class NodeCommands:
    """Builds, signs and sends commands. `epoch` is the epoch for which they are signed.

    A node carries out one command at a time, so each is sent when the one before it has been answered. One of the
    `suspects`, nodes that were faulty, gets no more time to load blocks or to measure links than for any other command.
    """

    def __init__(
        self,
        model: StoredModel,
        member: Member,
        keyring: Keyring,
        peers: Mapping[str, Peer],
        suspects: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._model = model
        self._member = member
        self._keyring = keyring
        self._peers = peers
        self._suspects = suspects
        self._signer = CommandSigner(member)
        self._paces = LoadPaces()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by node

    def peer(self, node: str) -> Peer:
        """The connection to a node; NodeLostError if it has left the cluster: it may, while somebody waits for it."""
        if peer := self._peers.get(node):
            return peer
        raise NodeLostError(f"{node} is no longer in the cluster")

    async def send(
        self, commands: Mapping[str, NodeCommand], epoch: int, within_s: Mapping[str, float] | None = None
    ) -> dict[str, Reply | BaseException]:
        """Send each node its command, all at once. Returns the reply of each node, or its error.

        `within_s` are shorter times in which some nodes must answer.
        """
        limits_s = within_s or {}
        calls = [self._send(node, command, epoch, limits_s.get(node)) for node, command in commands.items()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return dict(zip(commands, answers, strict=True))

    async def require(self, commands: Mapping[str, NodeCommand], epoch: int) -> dict[str, Reply]:
        """Send as `send` does, and return the replies. Raises the first error once all nodes have answered."""
        replies = {}
        for node, answer in (await self.send(commands, epoch)).items():
            if isinstance(answer, BaseException):
                raise answer
            replies[node] = answer
        return replies

    async def notify(self, commands: Mapping[str, NodeCommand], epoch: int) -> dict[str, Reply]:
        """Send as `send` does, and return the replies.

        A refusal stops nothing: a node that refuses what every node carries out is faulty.
        """
        # To prepare takes long only where blocks are loaded, and those nodes are asked with `send`.
        within_s = {node: _OTHERWISE_WITHIN_S for node, command in commands.items() if command.kind == "prepare"}
        replies = {}
        for node, answer in (await self.send(commands, epoch, within_s)).items():
            if isinstance(answer, ResplitError):
                kind = commands[node].kind
                level = _log.info if isinstance(answer, NodeLostError) else _log.warning
                level("a command was not carried out", kind=kind, node=node, error=str(answer))
                missed = isinstance(answer, CommandRefusedError) and answer.reason in _MISSED
                if not missed and not isinstance(answer, NodeLostError):
                    self.fault(node, f"it refuses {kind!r}: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                replies[node] = answer
        return replies

    def fault(self, node: str, reason: str) -> None:
        """Treat a node as lost because of what it did. It may have left the cluster since."""
        if peer := self._peers.get(node):
            peer.fault(reason)

    def obeyed_epochs(self, nodes: Iterable[str]) -> dict[str, int]:
        """The highest epoch that each node had obeyed when it was connected."""
        hellos = {node: self._peers[node].hello for node in nodes}
        return {node: hello.epoch for node, hello in hellos.items() if hello}

    def prepare(self, node: str, route: Route, rules: PlacementRules, replace_current: bool) -> Prepare:
        """The command that has a node load its blocks of a route."""
        shards = self._shards(node, route.blocks_of(node), rules.features)
        return Prepare(route, replace_current, self._model.spec, rules.private, rules.cluster.kv_tokens, shards)

    def standby(self, node: str, blocks: Sequence[int], rules: PlacementRules) -> Standby:
        """The command that has a node keep blocks ready, the most wanted first."""
        return Standby(tuple(blocks), self._model.spec, rules.private, self._shards(node, blocks, rules.features))

    def profile(self, node: str, rules: PlacementRules) -> Profile:
        """The command that has a node time one block of each kind that it may hold.

        One block is enough, because blocks of a kind take equal times.
        """
        trusted = node in rules.cluster.trusted
        first_of_kind: dict[str, int] = {}
        for index, block in enumerate(rules.features):
            if trusted or not block.private:
                first_of_kind.setdefault(block.kind, index)
        blocks = tuple(sorted(first_of_kind.values()))
        return Profile(blocks, self._model.spec, rules.private, self._shards(node, blocks, rules.features))

    def connect(self, node: str, addresses: Mapping[str, Address], rules: PlacementRules) -> Connect:
        """The command that has a node connect to the others."""
        links = {name: rules.cluster.link(node, name) for name in addresses if name != node}
        shapes = {name: Shape(link.latency, link.bandwidth) for name, link in links.items() if link}
        trusted = node in rules.cluster.trusted
        return Connect(trusted, rules.private, addresses, shapes)

    def trust(self, node: str, rules: PlacementRules) -> Trust:
        """The command that says whether a node is trusted, and which blocks are private."""
        return Trust(node in rules.cluster.trusted, rules.private)

    async def _send(self, node: str, command: NodeCommand, epoch: int, within_s: float | None) -> Reply:
        peer, limit_s = self.peer(node), within_s or self._limit_s(node, command)
        faults_before = peer.fault_count
        async with self._turns[node]:
            if peer.fault_count > faults_before:  # each command that a node does not answer would take as long again
                raise NodeLostError(f"{node} was found faulty before {command.kind!r} was sent")
            if node in self._suspects():
                limit_s = min(limit_s, _OTHERWISE_WITHIN_S)
            if isinstance(command, Prepare | Profile):
                command = replace(command, within_s=limit_s)
            signed = self._signer.sign(command.kind, to_body(command), audience=peer.audience, epoch=epoch)
            sent_s = time.monotonic()
            reply = await peer.command(command.kind, signed, limit_s)
            if isinstance(command, Prepare):
                loaded_bytes = _bytes_of(command.shards, reply.get("loaded", ()))
                self._paces.note(node, loaded_bytes, time.monotonic() - sent_s)
            return reply

    def _limit_s(self, node: str, command: NodeCommand) -> float:
        """The seconds in which a node must answer a command."""
        limit_s = _ANSWER_WITHIN_S.get(command.kind, _OTHERWISE_WITHIN_S)
        if not isinstance(command, Prepare | Profile) or not command.shards:
            return limit_s
        # A stand-by block that the node loads just then comes first, and may be any block.
        load_bytes = _bytes_of(command.shards, command.shards) + self._keyring.largest_sealed_bytes
        return limit_s + self._paces.limit_s(node, load_bytes)

    def _shards(self, node: str, blocks: Sequence[int], features: Sequence[BlockFeatures]) -> dict[int, WrappedShard]:
        """The shard of each block, its data key wrapped for this node alone."""
        public_key = self._member.public_wrap_key(node)
        shards = {}
        for block in blocks:
            entry = self._keyring[features[block].name]
            wrapped = wrap_key(entry.key, public_key, node=node, shard=entry.shard)
            shards[block] = WrappedShard(entry.shard, entry.sealed_bytes, wrapped)
        return shards


def _bytes_of(shards: Mapping[int, WrappedShard], blocks: Iterable[int]) -> int:
    return sum(shards[block].sealed_bytes for block in blocks if block in shards)
