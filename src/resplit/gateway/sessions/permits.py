"""The permits of one session: the gateway tells each node which passes and caches of the session it may accept.

A node refuses everything else. So each permit is given before it is needed, and taken back when the session has moved.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from resplit.errors import NodeLostError
from resplit.wire.node_pb2 import Step
from resplit.wire.peers import Peer
from resplit.wire.permits import Permit
from resplit.wire.routes import Route

# The positions that nodes hold of one session, by node and by block.
Held = Mapping[str, Mapping[int, int]]
Answer = Mapping[int, int] | NodeLostError
_ANSWERS_WITHIN_S = 5.0
# A recovery does not wait longer for a node that the new route does not need.
_OTHERS_ANSWER_WITHIN_S = 1.0


class SessionPermits:
    """What the nodes were told about a session that may cache `capacity` tokens.

    A permit that a node has already is not sent again. So the repeated copies of a replica cost one permit.
    """

    def __init__(self, session: str, capacity: int, peers: Mapping[str, Peer]) -> None:
        self.session = session
        self._peers = peers
        self.attempt = 0  # rises with each loss; nodes refuse passes and caches of other attempts
        self.nodes: set[str] = set()  # all that may have a permit, and so caches; only grows
        self._empty = Permit(0, capacity)
        self._told: dict[str, Permit] = {}  # in this attempt
        self._holders: set[tuple[str, int]] = set()  # node and block of every cache that may exist
        # A node must get its permits in the order in which they were decided.
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changing: set[asyncio.Task[None]] = set()  # the tasks of `keep_only_soon`

    def peer(self, node: str) -> Peer:
        """The connection to a node; NodeLostError if it has left the cluster."""
        if node not in self._peers:
            raise NodeLostError(f"{node} has left the cluster")
        return self._peers[node]

    def new_attempt(self) -> None:
        """Begin a new attempt. No node has a permit for it yet."""
        self.attempt += 1
        self._empty = replace(self._empty, attempt=self.attempt)
        self._told.clear()

    def forget(self, node: str) -> None:
        """Assume that a node has no permit: it was lost, and may have started again."""
        self._told.pop(node, None)

    def start(self, route: Route, first: Step) -> dict[str, Step]:
        """Have the first step of the session bring the first node's permit.

        Returns a step without values for each other node of `route`, by name. It brings that node's permit, and is
        faster than a call: the nodes must have their permits before the pass comes to them.
        """
        self._note_hosts(route)
        self._told = dict.fromkeys(route.placement, self._for_passes(route))
        self.nodes |= self._told.keys()
        first.permit.CopyFrom(self._for_passes(route).to_wire(self.session, keep=False))
        others = {node: Step() for node in self._told if node != route.segments[0].node}
        for step in others.values():
            step.CopyFrom(first)
            step.ClearField("values")
        return others

    async def begin(self, route: Route, nodes: Collection[str]) -> Held:
        """Have `nodes` begin the attempt, on `route`.

        Returns the positions that each node holds of the session by block, without nodes that do not answer, and
        without caches that no node was to have.
        """
        hosts = set(route.placement)
        answers = await asyncio.gather(
            self._tell(hosts & set(nodes), lambda node, told: self._for_passes(route), keep=True),
            self._tell(set(nodes) - hosts, lambda node, told: self._empty, _OTHERS_ANSWER_WITHIN_S, keep=True),
        )
        held = {
            node: {block: positions for block, positions in lengths.items() if (node, block) in self._holders}
            for node, lengths in (answers[0] | answers[1]).items()
            if not isinstance(lengths, NodeLostError)
        }
        self._note_hosts(route)
        return held

    async def enter(self, route: Route) -> None:
        """Before passes use `route`, let its nodes run them, beside those of earlier routes.

        NodeLostError if a node does not answer.
        """
        self._note_hosts(route)
        answers = await self._tell(
            set(route.placement), lambda node, told: replace(told, epochs=told.epochs | {route.epoch})
        )
        _raise_first(answers)

    async def allow(self, senders: Mapping[str, Mapping[int, str]]) -> None:
        """Before transfers of caches, let each node that gets some accept them from their `senders`, by block.

        NodeLostError if a node does not answer.
        """
        new = {node: blocks for node, blocks in senders.items() if not self._accepts(node, blocks)}
        if not new:
            return
        self._holders |= {(node, block) for node, blocks in new.items() for block in blocks}
        answers = await self._tell(new, lambda node, told: replace(told, senders={**told.senders, **new[node]}))
        _raise_first(answers)

    async def keep_only(self, route: Route) -> None:
        """Let the nodes of `route` run its passes, and take back all else except transfers from the hosts of blocks.

        NodeLostError if a node of the route does not answer.
        """
        self._note_hosts(route)
        hosts = route.placement

        def kept(node: str, told: Permit) -> Permit:
            senders = {block: sender for block, sender in told.senders.items() if hosts[block] == sender}
            return replace(self._for_passes(route) if node in hosts else self._empty, senders=senders)

        answers = await self._tell(self._told.keys() | set(hosts), kept)
        _raise_first({node: answer for node, answer in answers.items() if node in hosts})

    def keep_only_soon(self, route: Route, on_loss: Callable[[str], None]) -> None:
        """`keep_only` in the background: passes need not wait for it. `on_loss` gets the reason if it fails."""

        async def keep() -> None:
            try:
                await self.keep_only(route)
            except NodeLostError as error:
                on_loss(str(error))

        task = asyncio.create_task(keep(), name=f"permits of session {self.session}")
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)

    def stop(self) -> None:
        """Give up what `keep_only_soon` has begun."""
        for task in self._changing:
            task.cancel()

    def _accepts(self, node: str, senders: Mapping[int, str]) -> bool:
        """Whether a node has been told to accept caches from these senders, and nothing else is on its way to it."""
        told = self._told.get(node)
        return told is not None and not self._locks[node].locked() and senders.items() <= told.senders.items()

    def _for_passes(self, route: Route) -> Permit:
        return replace(self._empty, epochs=frozenset({route.epoch}))

    def _note_hosts(self, route: Route) -> None:
        self._holders |= {(node, block) for block, node in enumerate(route.placement)}

    async def _tell(
        self,
        nodes: Collection[str],
        change: Callable[[str, Permit], Permit],
        within_s: float = _ANSWERS_WITHIN_S,
        keep: bool = False,
    ) -> dict[str, Answer]:
        """Change the permits of nodes, by name and present permit, and return the answers."""
        answers = await asyncio.gather(*(self._change(node, change, within_s, keep) for node in nodes))
        return dict(zip(nodes, answers, strict=True))

    async def _change(self, node: str, change: Callable[[str, Permit], Permit], within_s: float, keep: bool) -> Answer:
        async with self._locks[node]:
            told = self._told.get(node)
            permit = change(node, told or self._empty)
            if permit == told:
                return {}
            self.forget(node)  # until it answers
            self.nodes.add(node)
            try:
                held = await self.peer(node).permit(self.session, permit, keep, within_s)
            except NodeLostError as error:
                return error
            if permit.attempt == self.attempt:
                self._told[node] = permit
            return held


def _raise_first(answers: Mapping[str, Answer]) -> None:
    for answer in answers.values():
        if isinstance(answer, NodeLostError):
            raise answer
