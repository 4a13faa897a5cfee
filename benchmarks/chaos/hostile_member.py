"""A member that uses its own valid credentials to harm others, as a process in the place of `resplit node`.

It is honest until it gets SIGUSR1. From then on it says anything at any moment. It writes what it said, and what it
heard of private blocks, as JSON into the file that it was given.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.server import Stream

from resplit.cluster.parent import end_with_parent
from resplit.config import ClusterConfig, load_cluster
from resplit.errors import DataError
from resplit.files import write_atomically
from resplit.node.server import serve_node
from resplit.process import event_loop
from resplit.security.identity import CONTROLLER
from resplit.wire.addresses import Address
from resplit.wire.node_pb2 import (
    CachePart,
    CloseRequest,
    CommandRequest,
    EchoRequest,
    ReportRequest,
    Step,
    Tensor,
    Token,
    TransferRequest,
)
from resplit.wire.permits import Permit
from tests.support.hostile import NONSENSE_REPLIES, Honest, HostileClient, HostileNode, Lie, breaks, draws, hangs

Mode = Literal["forges", "talks_nonsense", "hangs", "anything"]
MODES: tuple[Mode, ...] = get_args(Mode)
PRIVATE = frozenset({0, 1, 7})  # embedding, first layer and head of the model of six layers
_CALLS = ("Command", "Report", "Echo", "Permit", "TransferCache", "Caches", "Close", "Steps", "Tokens")
NOTES_EVERY_S = 0.5
_EVERY_S = 0.02
_WITHIN_S = 2.0
_POSITIONS = 256
_LIKELY, _LAST = 0.6, 8


@dataclass
class HostileMember:
    """Forges messages of all kinds about the sessions that it knows of, and answers calls in the way of its `mode`."""

    name: str
    mode: Mode
    client: HostileClient
    others: tuple[str, ...]
    rng: random.Random
    node: HostileNode = field(default_factory=HostileNode)
    said: Counter[str] = field(default_factory=Counter)
    private_s: list[float] = field(default_factory=list)  # when it heard of a private block (seconds since 1970)
    sessions: deque[tuple[str, int]] = field(default_factory=lambda: deque(maxlen=_LAST))  # with their attempts
    epochs: deque[int] = field(default_factory=lambda: deque([1], maxlen=_LAST))

    def __post_init__(self) -> None:
        self.hostile = False
        self.node.lies = {call: self._answering(call) for call in _CALLS}
        self._ways: tuple[Callable[[], Awaitable[Any]], ...] = (
            self._say_tokens,
            self._say_tokens,
            self._send_steps,
            self._send_caches,
            self._call,
        )

    async def attack(self) -> None:
        """Send one forged message after another, for ever."""
        self.hostile = True
        while True:
            with contextlib.suppress(GRPCError, StreamTerminatedError, OSError, TimeoutError):
                async with asyncio.timeout(_WITHIN_S):
                    await self.rng.choice(self._ways)()
            await asyncio.sleep(_EVERY_S)

    def write(self, out: Path) -> None:
        """Write what it said and heard."""
        write_atomically(out, json.dumps({"said": self.said, "private_s": self.private_s}))

    def _answering(self, call: str) -> Lie:
        async def answer(stream: Stream[Any, Any], honest: Honest) -> None:
            self._overhear(stream)
            lie = self._lie(call) if self.hostile else None
            self.said[f"{call}: {getattr(lie, '__name__', 'honest')}"] += 1
            await (lie(stream, honest) if lie else honest(stream))

        return answer

    def _lie(self, call: str) -> Lie | None:
        """How this call is answered; None for honestly."""
        nonsense = draws(NONSENSE_REPLIES.get(call, (b"\xff" * 9, b"\x08\x96\x01" * 99)), self.rng.randrange(2**32))
        lies: dict[Mode, Lie] = {"talks_nonsense": nonsense, "hangs": hangs}
        if self.mode == "forges" or self.rng.random() > _LIKELY:
            return None
        return lies.get(self.mode) or self.rng.choice((nonsense, hangs, breaks))

    def _overhear(self, stream: Stream[Any, Any]) -> None:
        """Note the sessions and epochs in what is received, and when it is about a private block."""
        receive = stream.recv_message

        async def noted() -> Any:
            message = await receive()
            if (session := getattr(message, "session", "")) and (session, message.attempt) not in self.sessions:
                self.sessions.append((session, message.attempt))
            for epoch in [*getattr(message, "epochs", ()), getattr(message, "epoch", 0)]:
                if epoch and epoch not in self.epochs:
                    self.epochs.append(epoch)
            if (isinstance(message, CachePart) and PRIVATE.intersection(message.blocks)) or _is_prompt(message):
                self.private_s.append(time.time())
            return message

        stream.recv_message = noted

    def _some_session(self) -> tuple[str, int]:
        session, attempt = self.rng.choice(self.sessions) if self.sessions else ("none", 0)
        return session, self.rng.choice((attempt, attempt, attempt, attempt + 1, 2**32 - 1))

    async def _say_tokens(self) -> None:
        """Tokens or errors of one session at many positions."""
        session, attempt = self._some_session()
        first, epoch = self.rng.randrange(_POSITIONS), self.rng.choice(self.epochs)
        kind = self.rng.choice(("", "", "", "lost", "data", "capacity"))
        forged = Token(session=session, attempt=attempt, epoch=epoch, token_ids=[self.rng.randrange(300)])
        forged.error, forged.error_kind = ("forged", kind) if kind else ("", "")
        if self.mode == "anything" and self.rng.random() < 0.1:
            forged.token_ids[0] = self.rng.choice((-1, 2**31 - 1, 2**62))
        for position in range(first, min(first + 64, _POSITIONS)):
            forged.position = position
            await self.node.say(forged)
        self.said["tokens"] += 64

    async def _send_steps(self) -> None:
        session, attempt = self._some_session()
        step = Step(number=1, session=session, attempt=attempt, epoch=self.rng.choice(self.epochs))
        step.segment, step.start = self.rng.randrange(4), self.rng.choice((0, self.rng.randrange(_POSITIONS)))
        step.gateway, step.left_s = CONTROLLER, 10.0
        step.stepwise, step.drafts = self.rng.random() < 0.5, self.rng.choice((0, 0, 1, 2**32 - 1))
        if self.rng.random() < 0.3:
            step.permit.CopyFrom(Permit(attempt, _POSITIONS, frozenset(self.epochs)).to_wire(session, keep=False))
        step.values.CopyFrom(self.rng.choice((_tensor("int64", (1, 1)), _tensor("float32", (1, 1, 64)))))
        await self.client.steps(self.rng.choice(self.others), [step])
        self.said["steps"] += 1

    async def _send_caches(self) -> None:
        session, attempt = self._some_session()
        first = self.rng.choice((0, self.rng.randrange(_POSITIONS)))
        part = CachePart(session=session, attempt=attempt, blocks=[self.rng.randrange(9)], first=first)
        part.values.CopyFrom(_tensor("float32", (2, 2, 4, 16)))
        await self.client.cache(self.rng.choice(self.others), [part])
        self.said["parts of caches"] += 1

    async def _call(self) -> None:
        """A call that only the controller may make, or a command without its signature."""
        session, attempt = self._some_session()
        permit = Permit(attempt, _POSITIONS, frozenset(self.epochs), dict.fromkeys(range(8), self.name))
        target = [self.name] * 8
        name, message = self.rng.choice(
            (
                ("Permit", permit.to_wire(session, keep=False)),
                ("Close", CloseRequest(sessions=[session])),
                ("TransferCache", TransferRequest(session=session, attempt=attempt, target=target, last=_POSITIONS)),
                ("Command", CommandRequest(kind="release", signed="a.b.c")),
                ("Report", ReportRequest()),
                ("Echo", EchoRequest(payload=bytes(1000))),
            )
        )
        self.said[f"calls of {name}"] += 1
        await self.client.call(self.rng.choice(self.others), name, message)


def _is_prompt(message: Any) -> bool:
    """Whether a message has the tokens of a prompt: only the host of the embedding gets them."""
    return isinstance(message, Step) and message.segment == 0


def _tensor(dtype: str, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for length in shape:
        count *= length
    return Tensor(dtype=dtype, shape=shape, data=bytes(count * {"int64": 8, "float32": 4}[dtype]))


async def serve(config: ClusterConfig, state: Path, name: str, mode: Mode, seed: int, out: Path) -> None:
    """Serve as the node `name`, honestly until SIGUSR1, and note in `out` what was said and heard."""
    addresses = {node.name: _address(node.address) for node in config.nodes}
    client, others = HostileClient(addresses, state / "keys" / name), tuple(addresses.keys() - {name})
    member = HostileMember(name, mode, client, others, random.Random(seed))
    begin = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, begin.set)

    async def attack() -> None:
        await begin.wait()
        await member.attack()

    async def note() -> None:
        while True:
            await asyncio.sleep(NOTES_EVERY_S)
            member.write(out)

    keys, registry = state / "keys" / name, str(state / "registry")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(attack())
        tasks.create_task(note())
        await serve_node(name, config, keys, registry, addresses[name], asyncio.Event(), member.node.service)


def _address(text: str | None) -> Address:
    if text is None:
        raise DataError("every node needs an address")
    return Address.parse(text)


def main() -> None:
    """Run until the parent process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("name")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("seed", type=int)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    end_with_parent()
    config = load_cluster(given.state / "cluster.yaml")
    event_loop.run(serve(config, given.state, given.name, given.mode, given.seed, given.out))


if __name__ == "__main__":
    main()
