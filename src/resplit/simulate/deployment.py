"""Epochs in simulated time: prepare, commit and release, with what a move costs.

A node that gets blocks fetches and loads them, one after another; the live epoch serves meanwhile. Blocks that stand by
need not be loaded. A move is staged where a node has no room for its new blocks beside the old ones: passes pause until
the caches are moved and such nodes have loaded their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from resplit.control.rules import PlacementRules
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import ProposalRefusedError
from resplit.simulate.agenda import Agenda
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedRoute
from resplit.simulate.standby import SimulatedStandby

__all__ = ["Loading", "SimulatedDeployment"]


@dataclass(frozen=True)
class Loading:
    """How long loading takes: at a rate, or over the gateway's link if the rate is None, plus a time per epoch.

    `commit_s` is the time of an epoch's commands, whatever it moves.
    """

    registry_bytes_per_s: float | None = 1e8
    commit_s: float = 0.05


@dataclass(frozen=True)
class _Prepared:
    """What it took to prepare an epoch."""

    loaded_bytes: float
    longest_load_bytes: float = 0.0
    ready_bytes: float = 0.0
    prepare_s: float = 0.0
    staged: bool = False


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
        self._weight_bytes = [feature.weight_bytes for feature in rules.features]
        self._standby = SimulatedStandby(
            tuple(machines), self._weight_bytes, self._load_s, self._holds, self._free_bytes, agenda
        )

    def switch(self, proposal: Proposal) -> None:
        """Make a placement live now, as if its blocks had been loaded before.

        A cluster has seen how long the blocks of the first one took to load, and so has this.
        """
        self._ensure_allowed(proposal)
        prepared = self._first_load(proposal.placement) if self.live is None else _Prepared(0.0)
        self._go_live(self._route(proposal), proposal, prepared)

    def deploy(self, proposal: Proposal, then: Callable[[LiveEpoch], None]) -> None:
        """Begin to make a placement live; `then` is called once it is.

        ProposalRefusedError if another one is being prepared, if it was planned against an earlier epoch, or if it
        breaks a rule or uses a node that is down.
        """
        if self._busy:
            raise ProposalRefusedError("another epoch is being prepared; plan again")
        if self.live is not None and proposal.based_on != self.live.epoch:
            raise ProposalRefusedError(f"planned against epoch {proposal.based_on}, but {self.live.epoch} is live")
        self._ensure_allowed(proposal)
        route, begun_s, self._busy = self._route(proposal), self._agenda.now_s, True
        if proposal.action == RECOVER:  # the old epoch cannot serve: its blocks make room
            self._drop(route.placement, self._held)
        new = self._missing(route)
        full = [node for node, blocks in new.items() if proposal.action != RECOVER and not self._fits(node, blocks)]
        missing = self._claim(new)
        loaded_bytes, longest_bytes, new_bytes = self._bytes(missing), self._longest_bytes(missing), self._bytes(new)

        def commit() -> None:
            if broken := self._down(route.placement):
                self._busy = False
                self._gateway.lose(broken)
                return
            for node, blocks in missing.items():
                self._held[node] |= set(blocks)
            self._busy = False
            took_s = self._agenda.now_s - begun_s
            prepared = _Prepared(loaded_bytes, longest_bytes, new_bytes - loaded_bytes, took_s, staged=bool(full))
            then(self._go_live(route, proposal, prepared))

        loaded_s = self._loaded_s({node: blocks for node, blocks in missing.items() if node not in full})
        if full:
            left = {node: blocks for node, blocks in missing.items() if node in full}
            self._agenda.at(loaded_s, self._gateway.pause, lambda: self._stage(route, full, left, commit))
        else:
            self._agenda.at(loaded_s + self._loading.commit_s, commit)

    def ready(self) -> dict[str, tuple[int, ...]]:
        """The blocks that stand by, by node."""
        return {name: self._standby.of(name) for name in self._machines}

    def keep_ready(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Tell the nodes that are up which blocks to keep ready."""
        self._standby.keep({name: blocks for name, blocks in wanted.items() if self._machines[name].alive})

    def forget(self, node: str) -> None:
        """A node went down: it no longer has any blocks."""
        self._held[node].clear()
        self._standby.forget(node)

    def _stage(
        self,
        route: SimulatedRoute,
        full: Sequence[str],
        missing: Mapping[str, Sequence[int]],
        commit: Callable[[], None],
    ) -> None:
        """No pass is under way: nodes that are `full` drop what leaves, caches move, and the new blocks are loaded."""
        moved_s = self._gateway.move_all(route)
        self._drop(route.placement, full)

        def end() -> None:
            commit()
            self._gateway.unpause()

        self._agenda.at(max(moved_s, self._agenda.now_s), lambda: self._agenda.at(self._loaded_s(missing), end))

    def _claim(self, new: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Hold those of the `new` blocks that stand by. Returns the others, which have to be loaded, by node."""
        missing: dict[str, list[int]] = {}
        for node, blocks in new.items():
            for block in blocks:
                if self._standby.claim(node, block):
                    self._held[node].add(block)
                else:
                    missing.setdefault(node, []).append(block)
        return missing

    def _first_load(self, placement: Sequence[str]) -> _Prepared:
        """What it takes to load a whole placement; nothing is known without a rate."""
        rate = self._loading.registry_bytes_per_s
        if rate is None:
            return _Prepared(0.0)
        by_node = {node: _blocks_of(placement, node) for node in placement}
        longest_bytes = self._longest_bytes(by_node)
        return _Prepared(self._bytes(by_node), longest_bytes, prepare_s=longest_bytes / rate)

    def _go_live(self, route: SimulatedRoute, proposal: Proposal, prepared: _Prepared) -> LiveEpoch:
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
            loaded_bytes=prepared.loaded_bytes,
            longest_load_bytes=prepared.longest_load_bytes,
            ready_bytes=prepared.ready_bytes,
            prepare_s=prepared.prepare_s,
            staged=prepared.staged,
            note=proposal.note,
        )
        self.history.append(live)
        self._gateway.activate(route)
        self._release()
        return live

    def _release(self) -> None:
        """Free the blocks of earlier epochs that no session uses, or let them stand by."""
        if self.live is not None and not self._busy and self._gateway.oldest_epoch() == self.live.epoch:
            self._drop(self.live.placement, self._held)

    def _drop(self, placement: Sequence[str], nodes: Iterable[str]) -> None:
        """These nodes hold no other blocks than those of `placement`. Those that are wanted stand by."""
        for node in nodes:
            kept = set(_blocks_of(placement, node))
            for block in sorted(self._held[node] - kept):
                self._standby.retire(node, block)
            self._held[node] &= kept

    def _route(self, proposal: Proposal) -> SimulatedRoute:
        rules, number = self._rules, len(self.history) + 1
        trusted, features = rules.cluster.trusted, rules.features
        return SimulatedRoute.of(number, proposal.placement, self._machines, features, trusted, self._token_bytes)

    def _ensure_allowed(self, proposal: Proposal) -> None:
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
        done_s = [self._arrived_s(node, self._bytes({node: blocks})) for node, blocks in missing.items()]
        return max(done_s, default=self._agenda.now_s)

    def _load_s(self, node: str, block: int) -> float:
        """How long a node takes to load a block that is to stand by."""
        return self._arrived_s(node, self._weight_bytes[block]) - self._agenda.now_s

    def _arrived_s(self, node: str, size_bytes: float) -> float:
        """When a node has loaded so much, if it begins now."""
        now_s, source, rate = self._agenda.now_s, self._rules.cluster.source, self._loading.registry_bytes_per_s
        return now_s + size_bytes / rate if rate else self._network.background_due_s(source, node, size_bytes, now_s)

    def _holds(self, node: str, block: int) -> bool:
        return block in self._held[node]

    def _free_bytes(self, node: str) -> float:
        """The memory that neither the blocks of epochs nor the caches of sessions take."""
        taken = self._bytes({node: self._held[node]}) + self._gateway.cached_bytes(node)
        return self._rules.cluster.node(node).memory - taken

    def _longest_bytes(self, blocks: Mapping[str, Iterable[int]]) -> float:
        """The weights of the node that has to load most of them."""
        return max((self._bytes({node: each}) for node, each in blocks.items()), default=0.0)

    def _bytes(self, blocks: Mapping[str, Iterable[int]]) -> float:
        return sum(self._weight_bytes[block] for each in blocks.values() for block in each)


def _blocks_of(placement: Sequence[str], node: str) -> list[int]:
    return [block for block, host in enumerate(placement) if host == node]
