"""What the controller tells nodes: which words each kind of command has, signed for one node, and its answer.

Knows how an order is written and sent; when to give which is for the controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import structlog

from resplit.control.rules import PlacementRules
from resplit.errors import NodeLostError, ResplitError
from resplit.model.source import StoredModel
from resplit.security.identity import Member
from resplit.security.signing import CommandSigner
from resplit.shards.keyring import Keyring
from resplit.shards.sealing import wrap_key
from resplit.types import BlockFeatures
from resplit.wire.peers import Address, Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
Body = dict[str, Any]


class NodeCommands:
    """Writes, signs and sends commands."""

    def __init__(self, model: StoredModel, member: Member, keyring: Keyring, peers: Mapping[str, Peer]) -> None:
        self._model = model
        self._member = member
        self._keyring = keyring
        self._peers = peers
        self._signer = CommandSigner(member)

    async def send(
        self, nodes: Sequence[str], kind: str, body: Callable[[str], Body], epoch: int
    ) -> list[Body | BaseException]:
        """Send a command to nodes at once; each one's answer, or the error that came instead, in order."""
        calls = [
            self._peers[name].command(kind, self._signer.sign(kind, body(name), audience=name, epoch=epoch))
            for name in nodes
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    async def require(self, nodes: Sequence[str], kind: str, body: Callable[[str], Body], epoch: int) -> list[Body]:
        """As `send`; the first error is raised once all have answered."""
        answers = await self.send(nodes, kind, body, epoch)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, dict)]

    async def notify(self, nodes: Sequence[str], kind: str, body: Callable[[str], Body], epoch: int) -> list[str]:
        """As `send`, passing over those that cannot be reached (they hold nothing) or refuse; who obeyed."""
        answers = await self.send(nodes, kind, body, epoch)
        for name, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, ResplitError):
                level = _log.info if isinstance(answer, NodeLostError) else _log.warning
                level("command not obeyed", kind=kind, node=name, error=str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        return [name for name, answer in zip(nodes, answers, strict=True) if isinstance(answer, dict)]

    def prepare(self, route: Route, rules: PlacementRules, replace_current: bool) -> Callable[[str], Body]:
        """For a node: hold your blocks of this route; `replace_current`: instead of all that you have."""

        def order(node: str) -> Body:
            return {
                "route": route.to_json(),
                "replace_current": replace_current,
                "model": asdict(self._model.spec),
                "private": sorted(rules.private),
                "kv_tokens": rules.cluster.kv_tokens,
                "shards": self._shards(node, route.blocks_of(node), rules.features),
            }

        return order

    def profile(self, rules: PlacementRules) -> Callable[[str], Body]:
        """For a node: time one block of each kind that you may hold. Layers are alike, so one speaks for all."""

        def order(node: str) -> Body:
            trusted = node in rules.cluster.trusted
            first: dict[str, int] = {}
            for index, block in enumerate(rules.features):
                if trusted or not block.private:
                    first.setdefault(block.kind, index)
            blocks = sorted(first.values())
            return {
                "blocks": blocks,
                "model": asdict(self._model.spec),
                "private": sorted(rules.private),
                "shards": self._shards(node, tuple(blocks), rules.features),
            }

        return order

    def connect(
        self, addresses: Mapping[str, Address], rules: PlacementRules, sessions: Sequence[str]
    ) -> Callable[[str], Body]:
        """For a node: where the others are and how far, whether you are trusted, and which sessions there are.

        Caches of other sessions are left from another life.
        """

        def order(node: str) -> Body:
            shapes = {name: rules.cluster.link(node, name) for name in addresses if name != node}
            return {
                "addresses": {name: str(address) for name, address in addresses.items()},
                "links": {
                    name: {"latency_s": shape.latency, "bandwidth_bytes_per_s": shape.bandwidth}
                    for name, shape in shapes.items()
                    if shape
                },
                "sessions": list(sessions),
                **self.trust(rules)(node),
            }

        return order

    def trust(self, rules: PlacementRules) -> Callable[[str], Body]:
        """For a node: whether it is trusted, and with which blocks it must be."""
        return lambda node: {"trusted": node in rules.cluster.trusted, "private": sorted(rules.private)}

    def _shards(
        self, node: str, blocks: tuple[int, ...], features: tuple[BlockFeatures, ...]
    ) -> dict[str, dict[str, str]]:
        """For each block its shard's name and the data key, wrapped for this node alone."""
        public = self._member.public_wrap_key(node)
        result = {}
        for block in blocks:
            entry = self._keyring[features[block].name]
            wrapped = wrap_key(entry.key, public, node=node, shard=entry.shard)
            result[str(block)] = {"name": entry.shard, "key": wrapped.hex()}
        return result
