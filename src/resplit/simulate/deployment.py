"""Epochs in simulated time: prepare, commit and release, with what a move costs.

A node that gets blocks fetches and loads them, one after another; the live epoch serves meanwhile. A move whose blocks
do not fit beside the old ones is staged: passes pause until the caches are moved and the new blocks are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from resplit.control.rules import PlacementRules
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import ProposalRefusedError
from resplit.simulate.agenda import Agenda
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedRoute

__all__ = ["Loading", "SimulatedDeployment"]


@dataclass(frozen=True)
class Loading:
    """How long loading takes: at a rate, or over the gateway's link if the rate is None, plus a time per epoch.

    `commit_s` is the time of an epoch's commands, whatever it moves.
    """

    registry_bytes_per_s: float | None = 1e8
    commit_s: float = 0.05


class SimulatedDeployment:
    """The epochs of one cluster. `history` has all that were live. One epoch is prepared at a time."""

    def __init__(
        self,
        rules: PlacementRules,
        machines: Mapping[str, Machine],
        gateway: SimulatedGateway,
        network: SimulatedNetwork,
        agenda: Agenda,
        loading: Loading,
        token_bytes: float,
    ) -> None:
        self.history: list[LiveEpoch] = []
        self.live: SimulatedRoute | None = None
        self._rules = rules
        self._machines = machines
        self._gateway = gateway
        self._network = network
        self._agenda = agenda
        self._loading = loading
        self._token_bytes = token_bytes
        self._busy = False
        self._held: dict[str, set[int]] = {name: set() for name in machines}  # the blocks that nodes have loaded
        gateway.on_settled = self._release

    def switch(self, proposal: Proposal) -> None:
        """Make a placement live now, as if its blocks had been loaded before."""
        self._ensure_lawful(proposal)
        self._go_live(self._route(proposal), proposal, 0.0, 0.0, staged=False)

    def deploy(self, proposal: Proposal, then: Callable[[LiveEpoch], None]) -> None:
        """Begin to make a placement live; `then` is called once it is.

        ProposalRefusedError if another one is being prepared, if it was planned against an earlier epoch, or if it
        breaks a rule or uses a node that is down.
        """
        if self._busy:
            raise ProposalRefusedError("another epoch is being prepared; plan again")
        if self.live is not None and proposal.based_on != self.live.epoch:
            raise ProposalRefusedError(f"planned against epoch {proposal.based_on}, but {self.live.epoch} is live")
        self._ensure_lawful(proposal)
        route, begun_s, self._busy = self._route(proposal), self._agenda.now_s, True
        missing = self._missing(route)
        loaded_bytes = sum(self._rules.features[block].weight_bytes for blocks in missing.values() for block in blocks)
        if proposal.action == RECOVER:  # the old epoch cannot serve: its blocks make room
            for name, blocks in self._held.items():
                blocks &= set(_blocks_of(route.placement, name))
        staged = proposal.action != RECOVER and any(not self._fits(node, blocks) for node, blocks in missing.items())

        def commit() -> None:
            if broken := self._down(route.placement):
                self._busy = False
                self._gateway.lose(broken)
                return
            for node, blocks in missing.items():
                self._held[node] |= set(blocks)
            self._busy = False
            took_s = self._agenda.now_s - begun_s
            then(self._go_live(route, proposal, loaded_bytes, took_s, staged))

        if staged:
            self._gateway.pause(lambda: self._stage(route, missing, commit))
        else:
            self._agenda.at(self._loaded_s(missing) + self._loading.commit_s, commit)

    def forget(self, node: str) -> None:
        """A node went down: it no longer has any blocks."""
        self._held[node].clear()

    def _stage(self, route: SimulatedRoute, missing: Mapping[str, Sequence[int]], commit: Callable[[], None]) -> None:
        """No pass is under way: drop what leaves, move the caches, load the new blocks."""
        moved_s = self._gateway.move_all(route)
        for name, blocks in self._held.items():
            blocks &= set(_blocks_of(route.placement, name))

        def end() -> None:
            commit()
            self._gateway.unpause()

        self._agenda.at(max(moved_s, self._agenda.now_s), lambda: self._agenda.at(self._loaded_s(missing), end))

    def _go_live(
        self, route: SimulatedRoute, proposal: Proposal, loaded_bytes: float, prepare_s: float, staged: bool
    ) -> LiveEpoch:
        self.live = route
        for node in set(route.placement):
            self._held[node] |= set(_blocks_of(route.placement, node))
        live = LiveEpoch(
            epoch=route.epoch,
            committed_s=self._agenda.now_s,
            action=proposal.action,
            placement=proposal.placement,
            predicted_latency_s=proposal.predicted_latency_s,
            lower_bound=proposal.lower_bound,
            loaded_bytes=loaded_bytes,
            prepare_s=prepare_s,
            staged=staged,
            note=proposal.note,
        )
        self.history.append(live)
        self._gateway.activate(route)
        self._release()
        return live

    def _release(self) -> None:
        """Free the blocks of earlier epochs that no session uses."""
        if self.live is not None and not self._busy and self._gateway.oldest_epoch() == self.live.epoch:
            for name, blocks in self._held.items():
                blocks &= set(_blocks_of(self.live.placement, name))

    def _route(self, proposal: Proposal) -> SimulatedRoute:
        rules, number = self._rules, len(self.history) + 1
        trusted, features = rules.cluster.trusted, rules.features
        return SimulatedRoute.of(number, proposal.placement, self._machines, features, trusted, self._token_bytes)

    def _ensure_lawful(self, proposal: Proposal) -> None:
        if violation := self._rules.violation(proposal.placement):
            raise ProposalRefusedError(violation)
        if down := self._down(proposal.placement):
            raise ProposalRefusedError(f"{down} cannot be reached", frozenset([down]))

    def _down(self, placement: Sequence[str]) -> str | None:
        return next((node for node in placement if not self._machines[node].alive), None)

    def _missing(self, route: SimulatedRoute) -> dict[str, list[int]]:
        """The blocks that each node has to load."""
        missing: dict[str, list[int]] = {}
        for block, node in enumerate(route.placement):
            if block not in self._held[node]:
                missing.setdefault(node, []).append(block)
        return missing

    def _fits(self, node: str, blocks: Sequence[int]) -> bool:
        """Whether a node can hold blocks beside those that it has, each with its part of the caches (eq. 5)."""
        features, kv_tokens = self._rules.features, self._rules.cluster.kv_tokens
        both = [features[block] for block in {*self._held[node], *blocks}]
        needed = sum(each.weight_bytes + kv_tokens * each.kv_bytes_per_token for each in both)
        return needed <= self._rules.cluster.node(node).memory

    def _loaded_s(self, missing: Mapping[str, Sequence[int]]) -> float:
        """When the last node has loaded its blocks. Nodes load at the same time."""
        now_s, source, rate = self._agenda.now_s, self._rules.cluster.source, self._loading.registry_bytes_per_s
        done_s = now_s
        for node, blocks in missing.items():
            size = sum(self._rules.features[block].weight_bytes for block in blocks)
            arrived_s = now_s + size / rate if rate else self._network.background_due_s(source, node, size, now_s)
            done_s = max(done_s, arrived_s)
        return done_s


def _blocks_of(placement: Sequence[str], node: str) -> list[int]:
    return [block for block, host in enumerate(placement) if host == node]
