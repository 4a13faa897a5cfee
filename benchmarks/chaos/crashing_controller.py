"""A controller that dies at a chosen moment, and a wire from it that loses, repeats and delays commands.

The nodes are real; a dead controller is one whose log and connections do nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from resplit.config import ClusterConfig
from resplit.control.controller import Controller
from resplit.control.log import EpochLog, EpochStep
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import NodeLostError, ResplitError
from resplit.gateway.engine import GenerationRequest, Sampling
from resplit.model.source import StoredModel
from resplit.wire.peers import Peer
from tests.support.cluster import TRUSTED
from tests.support.in_process import InProcessCluster, until

PLACES = ("alpha", "beta", "gamma")
PROMPT = (5, 17, 40, 200, 31, 8, 99)
NEW_TOKENS = 6
_KV_TOKENS = 256
_CONSISTENT_WITHIN_S = 15.0

# lost: it never comes; unanswered: it comes, its answer does not; late: it comes when everything is over, or again and
# again; twice: it comes two times; slow: it comes after the others. Where an answer fails, the connection breaks.
Fault = Literal["lost", "unanswered", "late", "twice", "slow"]


class KilledError(BaseException):
    """The controller's process ended here."""


class Fate:
    """Counts what a controller does; it dies at event number `fatal`, if that is set, and does nothing after it."""

    def __init__(self) -> None:
        self.fatal: int | None = None
        self.events: list[str] = []
        self.dead = False

    def event(self, what: str) -> None:
        """Something is about to be done, or was just done."""
        if not self.dead:
            self.events.append(what)
            self.dead = len(self.events) - 1 == self.fatal
        if self.dead:
            raise KilledError(what)


class MortalLog(EpochLog):
    """The durable log of a controller that may die before or after each step."""

    def __init__(self, path: Path, fate: Fate) -> None:
        super().__init__(path)
        self._fate = fate

    def append(self, epoch: int, step: EpochStep, detail: Mapping[str, Any]) -> None:
        """As in the log."""
        self._fate.event(f"before {step}")
        super().append(epoch, step, detail)
        self._fate.event(f"after {step}")


class FaultyPeer:
    """A node as a mortal controller reaches it over a bad wire."""

    def __init__(self, peer: Peer, trial: Trial) -> None:
        self._peer = peer
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peer, name)

    async def command(self, kind: str, signed: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Send a command, or what the wire makes of it."""
        trial, name = self._trial, self._peer.name
        fate = trial.fate
        fate.event(f"before {kind} to {name}")
        fault = trial.faults.pop((kind, name), None)
        if fault == "slow":
            await asyncio.sleep(0.1)
        if fault == "late":
            trial.late.append((name, kind, signed))
        if fault not in ("lost", "late"):
            answer = await self._peer.command(kind, signed, timeout_s)
        if fault == "twice":
            with contextlib.suppress(ResplitError):
                await self._peer.command(kind, signed, timeout_s)
                trial.violations.append(f"{name} obeyed one {kind} two times")
        if fault in ("lost", "late", "unanswered"):
            trial.nodes.break_connections(name)
            raise NodeLostError(f"{name}: {kind} {fault}")
        fate.event(f"after {kind} to {name}")
        return answer


class FaultyPeers(Mapping[str, Peer]):
    """All nodes, so reached."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def __getitem__(self, name: str) -> Peer:
        peer: Any = FaultyPeer(self._trial.nodes.router.peers[name], self._trial)
        return peer

    def __iter__(self) -> Iterator[str]:
        return iter(self._trial.nodes.router.peers)

    def __len__(self) -> int:
        return len(self._trial.nodes.router.peers)


class Trial:
    """Three nodes and a controller to be tried; `expected` are the unsplit model's tokens for PROMPT."""

    def __init__(self, nodes: InProcessCluster, expected: list[int]) -> None:
        self.nodes = nodes
        self.expected = expected
        self.faults: dict[tuple[str, str], Fault] = {}
        self.late: list[tuple[str, str, str]] = []
        self.violations: list[str] = []
        self.highest = 0
        self.fate = Fate()
        self._take_office()

    async def deploy(self, placement: tuple[str, ...]) -> LiveEpoch:
        """Have a placement deployed, whatever is live."""
        live = self.controller.live
        return await self.controller.deploy(Proposal(placement, "re-split", live.epoch if live else 0))

    async def crash(self) -> None:
        """End the controller and the gateway as a kill would, and start them again."""
        self.fate.fatal, self.fate.dead = None, True
        await self.controller.stop()
        await self.nodes.router.disconnect()
        self.controller.log.close()
        self.fate = Fate()
        self.nodes.start_gateway()
        self._take_office()
        self.nodes.router.connect(self.nodes.addresses)

    async def resume(self) -> None:
        """What a controller does when it starts."""
        await self.nodes.router.wait_for(set(PLACES), 10)
        await self.controller.start()

    async def deliver_late(self) -> None:
        """Let the commands that were held back arrive now, the last first."""
        while self.late:
            name, kind, signed = self.late.pop()
            with contextlib.suppress(ResplitError):
                await self.nodes.peer(name).command(kind, signed)

    async def check(self) -> list[str]:
        """What is wrong once all has come to rest: nothing, if the promises of an epoch change hold."""
        try:
            await until(self._at_rest, _CONSISTENT_WITHIN_S)
        except TimeoutError:
            self.violations.append(f"no rest: {await self._where_it_stands()}")
        else:
            await self._check_service()
        live = self.controller.live
        if live and live.epoch < self.highest:
            self.violations.append(f"epoch {live.epoch} after {self.highest}")
        self.highest = live.epoch if live else self.highest
        found, self.violations = self.violations, []
        return found

    async def tokens(self) -> list[int]:
        """What the cluster answers to PROMPT."""
        wanted = GenerationRequest(PROMPT, NEW_TOKENS, Sampling(), "chat", frozenset(), None)
        return [token.token_id async for token in self.nodes.sessions.generate(wanted)]

    def _take_office(self) -> None:
        log = MortalLog(self.nodes.folder / "epochs.db", self.fate)
        self.controller: Controller = self.nodes.controller(log, FaultyPeers(self))

    async def _at_rest(self) -> bool:
        """One epoch on all nodes, the controller's, which the log says was committed; nothing held beside it."""
        live, log = self.controller.live, self.controller.log
        if live is None or log.epochs.live != live.epoch or log.unfinished() or self.nodes.sessions.ready():
            return False
        states = await self._states()
        self._check_privacy(states)
        return all(
            (state["epochs"] == [live.epoch] or (name not in live.placement and state["epochs"] == []))
            and state["prepared"] == []
            and sorted(state["blocks"]) == list(live.blocks_of(name))
            and state["sessions"] == 0
            for name, state in states.items()
        )

    async def _states(self) -> dict[str, dict[str, Any]]:
        try:
            return {name: await self.nodes.state(name) for name in PLACES}
        except NodeLostError:  # its connection was just severed
            return {name: {"epochs": [], "prepared": [], "blocks": [], "sessions": 0} for name in PLACES}

    def _check_privacy(self, states: dict[str, dict[str, Any]]) -> None:
        for name, state in states.items():
            if name not in TRUSTED and self.nodes.private & set(state["blocks"]):
                self.violations.append(f"{name} holds private blocks")

    async def _check_service(self) -> None:
        tokens = await self.tokens()
        if tokens != self.expected:
            self.violations.append(f"tokens {tokens}, not {self.expected}")
        epochs = self.nodes.sessions.records(0)[-1]["epochs"]
        log = self.controller.log
        if any("committed" not in [entry.step for entry in log.steps(epoch)] for epoch in epochs):
            self.violations.append(f"served by epochs {epochs}, not all of them committed")

    async def _where_it_stands(self) -> str:
        live, log = self.controller.live, self.controller.log.epochs
        keys = ("epochs", "prepared", "blocks", "sessions")
        states = {name: {key: state[key] for key in keys} for name, state in (await self._states()).items()}
        return f"controller {live and live.epoch}, log {log}, {self.nodes.sessions.ready() or 'ready'}, nodes {states}"


@contextlib.asynccontextmanager
async def trial(model: StoredModel, expected: list[int], folder: Path) -> AsyncIterator[Trial]:
    """Three real nodes on this event loop with a first placement deployed, and a controller that can be tried."""
    config = ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alpha",
            "trusted": TRUSTED,
            "nodes": [{"name": name, "memory": "8 MiB"} for name in PLACES],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "limits": {"context_tokens": _KV_TOKENS, "sessions": 8, "queue": 4, "deadline": "20 s"},
            "kv_tokens": _KV_TOKENS,
        }
    )
    nodes = InProcessCluster(config, model, folder)
    try:
        await asyncio.gather(*(nodes.start(name) for name in PLACES))
        tried = Trial(nodes, expected)
        await tried.resume()
        await tried.deploy(("alpha", "alpha", "beta", "beta", "gamma", "gamma", "beta", "alpha"))
        yield tried
        await tried.controller.stop()
    finally:
        await nodes.stop_all()
