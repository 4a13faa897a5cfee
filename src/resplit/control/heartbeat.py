"""Detects nodes that hang: each gets a heartbeat five times a second, and any message from it is a sign of life.

Broken connections are detected elsewhere, by their owner.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from resplit.errors import NodeLostError
from resplit.wire.peers import Peer

_log = structlog.get_logger(__name__)
BEAT_S = 0.2
# A node counts as hung after this silence plus the time that its answers usually take. A shorter limit would also catch
# nodes that are only busy.
HANGS_AFTER_S = 0.55
_ANSWER_WITHIN_S = 5.0
_TICK_S = 0.05
# At most this much silence is counted per tick: if this process itself stalled for longer, answers may wait unread.
_MAX_COUNTED_PER_TICK_S = 0.1
# If no node is heard for two beats, this machine is probably cut off or overloaded: that all nodes hang at once is less
# likely. Silence is then not counted, until the second limit.
_ALL_SILENT_AFTER_S = 2 * BEAT_S
_ALL_SILENT_UNTIL_S = 3.0


@dataclass
class AnswerTime:
    """Mean and deviation of the time that answers take, smoothed as in TCP (RFC 6298, 2.2 and 2.3)."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    last_s: float = 0.0

    @property
    def limit_s(self) -> float:
        """The time within which nearly every answer arrives."""
        return self.mean_s + 4 * self.deviation_s

    def add(self, answer_s: float, hung: bool) -> None:
        """Add the time of an answer. After a hang (`hung`), the first late answer does not count as slow."""
        before_s, self.last_s = self.last_s, min(answer_s, HANGS_AFTER_S)
        answer_s = min(before_s, self.last_s) if hung else self.last_s
        if not self.mean_s:
            self.mean_s, self.deviation_s = answer_s, answer_s / 2
        self.deviation_s += (abs(answer_s - self.mean_s) - self.deviation_s) / 4
        self.mean_s += (answer_s - self.mean_s) / 8


class Heartbeats:
    """Watches `peers`. `on_hang` is called once for each peer that falls silent; `silent` are those silent now."""

    def __init__(self, peers: Mapping[str, Peer], on_hang: Callable[[str], None]) -> None:
        self._peers = peers
        self._on_hang = on_hang
        self._watched: dict[str, Peer] = {}
        self._silence_s: dict[str, float] = {}  # counted time since the last sign of life
        self._answers: defaultdict[str, AnswerTime] = defaultdict(AnswerTime)
        self._none_heard_s = 0.0  # counted time since any peer was heard
        self._stopped = False
        self.silent: set[str] = set()

    def heard(self, name: str) -> None:
        """Note a sign of life."""
        self._silence_s[name] = self._none_heard_s = 0.0
        if name in self.silent:
            self.silent.discard(name)
            _log.info("a node is heard again", node=name)

    async def run(self) -> None:
        """Watch all peers, including later ones, until cancelled."""
        clock = asyncio.get_running_loop().time
        last_s = clock()
        async with asyncio.TaskGroup() as tasks:
            try:
                while True:
                    for name, peer in self._new_peers().items():
                        tasks.create_task(self._beat(name, peer), name=f"heartbeat of {name}")
                    await asyncio.sleep(_TICK_S)
                    now_s = clock()
                    self._pass_time(min(now_s - last_s, _MAX_COUNTED_PER_TICK_S))
                    last_s = now_s
            finally:
                self._stopped = True  # ends tasks whose cancellation was lost in a call (see `process.cancellation`)

    def _new_peers(self) -> dict[str, Peer]:
        """The peers that are new since the last call. They inherit nothing from former peers of the same name."""
        new = {name: peer for name, peer in self._peers.items() if self._watched.get(name) is not peer}
        for name in new.keys() | self._watched.keys() - self._peers.keys():
            self._silence_s.pop(name, None)
            self._answers.pop(name, None)
            self.silent.discard(name)
        self._watched = dict(self._peers)
        return new

    async def _beat(self, name: str, peer: Peer) -> None:
        while self._peers.get(name) is peer and not self._stopped:
            try:
                echo = await peer.echo(0, _ANSWER_WITHIN_S)
            except NodeLostError:
                pass
            else:
                self._answers[name].add(echo.round_trip_s, hung=name in self.silent)
                self.heard(name)
            await asyncio.sleep(BEAT_S)

    def _pass_time(self, seconds: float) -> None:
        self._none_heard_s += seconds
        if _ALL_SILENT_AFTER_S < self._none_heard_s < _ALL_SILENT_UNTIL_S:
            return
        for name in self._peers:
            self._silence_s[name] = silence_s = self._silence_s.get(name, 0.0) + seconds
            if silence_s > HANGS_AFTER_S + self._answers[name].limit_s and name not in self.silent:
                self.silent.add(name)
                _log.warning("a node is silent", node=name, silence_s=round(silence_s, 2))
                self._on_hang(name)
