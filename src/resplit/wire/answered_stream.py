"""A stream to one peer whose messages are numbered and answered. It opens when it is needed, also after it broke."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from google.protobuf.message import Message

from resplit.errors import ResplitError
from resplit.process.cancellation import cancel_and_wait
from resplit.wire.addresses import Address
from resplit.wire.message_stream import MessageStream, connected

Answer = TypeVar("Answer", bound=Message)


@dataclass
class Opened(Generic[Answer]):
    """An open stream, and the answers that are awaited over it, by number."""

    stream: MessageStream[Answer]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    awaited: dict[int, asyncio.Future[Answer]] = field(default_factory=dict)
    error: Exception | None = None  # with which it ended

    @contextlib.contextmanager
    def awaiting(self) -> Iterator[tuple[int, asyncio.Future[Answer]]]:
        """A new number, and the first answer to it. In this context alone, somebody waits for it.

        Both fail with OSError if the stream breaks, and with ValueError if the peer sends what is no answer.
        """
        if self.error is not None:  # nothing would end the wait
            raise self.error
        number, answer = next(self.numbers), asyncio.get_running_loop().create_future()
        self.awaited[number] = answer
        try:
            yield number, answer
        finally:
            del self.awaited[number]

    def fail(self, error: Exception) -> None:
        """Have all that is awaited fail, now and later."""
        self.error = error
        for answer in self.awaited.values():
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # retrieved: who awaited it may have failed already


class AnsweredStream(Generic[Answer]):
    """A stream of `what` to one peer. Its answers are of type `kind`, and `number_of` says what each belongs to."""

    def __init__(
        self,
        what: str,
        kind: type[Answer],
        number_of: Callable[[Answer], int],
        most_bytes: int,
        peer: str,
        address: Address,
        context: ssl.SSLContext,
    ) -> None:
        self._name = f"{what} to {peer}"
        self._kind = kind
        self._number_of = number_of
        self._most_bytes = most_bytes
        self._peer = peer
        self._address = address
        self._context = context
        self._current: Opened[Answer] | None = None
        self._opening = asyncio.Lock()
        self._receiving: set[asyncio.Task[None]] = set()

    async def opened(self) -> Opened[Answer]:
        """The stream, opened if it is not; OSError if the peer does not listen."""
        if self._current is not None:
            return self._current
        async with self._opening:
            if self._current is None:
                stream = await connected(self._kind, self._most_bytes, self._peer, self._address, self._context)
                self._current = Opened(stream)
                receiving = asyncio.create_task(self._receive(self._current), name=self._name)
                self._receiving.add(receiving)
                receiving.add_done_callback(self._receiving.discard)
            return self._current

    async def close(self) -> None:
        """End the stream, and with it all that is awaited."""
        await cancel_and_wait(self._receiving)

    async def _receive(self, opened: Opened[Answer]) -> None:
        error: Exception = ConnectionResetError(f"the stream of {self._name} was closed")
        try:
            await opened.stream.each(lambda answer: self._take(opened, answer))
        except ResplitError as fault:
            error = ValueError(str(fault))  # not a refusal: the peer sent what is no answer
        finally:
            self._current = None
            opened.stream.abort()
            opened.fail(error)

    def _take(self, opened: Opened[Answer], answer: Answer) -> None:
        """Note the first answer to a message that is not given up."""
        awaited = opened.awaited.get(self._number_of(answer))
        if awaited and not awaited.done():
            awaited.set_result(answer)
