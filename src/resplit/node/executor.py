"""Runs passes on the engine in one thread, many sessions at once, times blocks, and measures how busy the node is."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, cast

import structlog

from resplit.errors import RECALLED, CommandRefusedError, ResplitError
from resplit.model.activation import Activation
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.sampling import Drawn, logprobs, sample
from resplit.node.batching import Batch, ChunkPace, Part, SegmentPass, Waiting, next_batch, still_waiting
from resplit.node.emulation import Hardware, Load, Padding
from resplit.node.memory import Memory
from resplit.node.permits import Permits
from resplit.types import Sampling

_log = structlog.get_logger(__name__)
# The pass that follows one that ended at a position with these tokens, if there is one.
Follow = Callable[[int, tuple[int, ...]], SegmentPass | None]


@dataclass(frozen=True)
class BatchTime:
    """How long a part of a pass waited for its batch, and how long the batch ran, both on the clock.

    `load` is what the batch computed, `background_utilization` the share of the node that others used meanwhile.
    """

    waited_s: float
    computed_s: float
    load: Load
    background_utilization: float
    first_half_s: float = 0.0  # of `computed_s`, for the first half of the blocks; 0 if there is only one

    @property
    def node_s(self) -> float:
        """The time of the batch without what background load added."""
        return self.computed_s * (1 - self.background_utilization)


@dataclass(frozen=True)
class PassResult:
    """The result of one part of a pass, `tokens` positions from `start` on.

    `value` is hidden states, or the sampled tokens; None after the head of a part that is not the last. A part of a
    prompt that is scored has log probabilities and no tokens. `followed`: the next pass of the session waits already.
    """

    start: int
    tokens: int
    value: Activation | Drawn | None
    is_last: bool
    time: BatchTime | None = None  # set by the executor
    followed: bool = False


@dataclass(frozen=True)
class Timing:
    """Node time of one block in one pass of `sessions` sessions, without the time that background load added.

    The pass ended at `time_s`, in seconds since 1970. `tokens` are those of all sessions, `context_tokens` is the mean
    number of tokens cached before the pass.
    """

    time_s: float
    block: int
    phase: str
    tokens: int
    context_tokens: int
    sessions: int
    seconds: float


@dataclass(frozen=True)
class _Begun:
    """When a batch began, and the share of the node that others used then."""

    at_s: float
    background_utilization: float

    def computed_s(self) -> float:
        """Seconds on the clock since then."""
        return time.perf_counter() - self.at_s

    def node_s(self, seconds: float) -> float:
        """Seconds on the clock without what background load added."""
        return seconds * (1 - self.background_utilization)


def _nothing_follows(end: int, token_ids: tuple[int, ...]) -> None:
    """The caller begins its next pass itself."""


@dataclass(eq=False)
class _Caller:
    """The task that waits for a pass, and for those that follow it. Made in that task's event loop."""

    follow: Follow = _nothing_follows
    results: asyncio.Queue[PassResult | Exception] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    has_left: bool = False  # guarded by the executor's `_changed`


@dataclass(eq=False)
class _Queued(Waiting):
    """A waiting pass, and who waits for it. `whole`: no part of the pass came before it, and none follows."""

    caller: _Caller = field(default_factory=_Caller)
    whole: bool = True


_Outcome = tuple[_Queued, PassResult | Exception]


class Executor:
    """The engine, its thread, the accounting of its memory, and the permits of its sessions.

    `hardware` is None on real hardware. Passes run in the thread, in batches; it also queues the passes that follow
    them, before anybody sees their results. Loading blocks, transferring caches and ending sessions run in other
    threads, so that they need not wait for the passes of other sessions.
    """

    def __init__(
        self,
        engine: Engine[Any],
        memory_bytes: float,
        hardware: Hardware | None,
        kv_tokens: float = 0.0,
        permits: Permits | None = None,
    ) -> None:
        self.engine = engine
        self.hardware = hardware
        self.memory = Memory(engine, memory_bytes, kv_tokens)
        self.permits = permits or Permits()
        self.background_utilization = 0.0  # of real hardware; updated by the probe
        self.busy_s = 0.0
        self.errors: deque[float] = deque(maxlen=4096)  # relative errors of padded passes
        self.timings: deque[Timing] = deque(maxlen=4096)
        self._waiting: list[_Queued] = []  # in order of arrival; guarded by `_changed`
        self._changed = threading.Condition()
        self._in_parts: set[str] = set()  # sessions of whose pass the first parts came, and the last one has not
        self._closed = False
        self._passes = 0
        self._running: tuple[frozenset[str], Future[None]] | None = None  # sessions and end of the running batch
        self._pace = ChunkPace()
        self.ended: Future[None] = Future()  # of the thread; with its error if a defect ended it
        self._thread = threading.Thread(target=self._work, name="executor", daemon=True)
        self._thread.start()

    async def run(self, work: SegmentPass, follow: Follow = _nothing_follows) -> AsyncGenerator[PassResult]:
        """Run a pass and those that follow it, and yield the result of each part as it is done.

        Most passes have one part. `follow` is asked in the executor's thread, with the lock held under which passes
        are recalled, so that a pass either follows before that, or sees what came before it.

        CommandRefusedError for a session that has ended or an old attempt; CapacityError if its caches do not fit;
        DataError for values or positions that do not match what is held.
        """
        # Before it waits: a malformed tensor cannot be cut into chunks.
        rows = SessionRows(work.session, work.start, work.capacity, work.values, work.stepwise, work.drafts)
        self.engine.ensure_input(rows, work.first)
        caller = _Caller(follow)
        self._enqueue([_Queued(work, caller=caller)])
        async with contextlib.aclosing(self._results(caller)) as results:
            async for result in results:
                yield result

    async def shared_pass_s(self, works: Sequence[SegmentPass]) -> float:
        """Run passes of different sessions through one segment together, and with no others.

        Returns their node time in seconds, without the time that background load added. Errors as for `run`.
        """
        queued = [_Queued(replace(work, timed=True)) for work in works]
        self._enqueue(queued)
        results = [result for each in queued async for result in self._results(each.caller)]
        assert results[0].time is not None
        return results[0].time.node_s

    def _enqueue(self, queued: Sequence[_Queued]) -> None:
        with self._changed:
            for each in queued:
                each.since_s = time.perf_counter()
                self._pace.arrived(each.work, each.since_s)
                self._note_parts(each)
            self._waiting += queued
            self._changed.notify()

    def _note_parts(self, queued: _Queued) -> None:
        session, more = queued.work.session, queued.work.more
        queued.whole = not more and session not in self._in_parts
        (self._in_parts.add if more else self._in_parts.discard)(session)

    async def _results(self, caller: _Caller) -> AsyncGenerator[PassResult]:
        try:
            while True:
                result = await caller.results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
                if result.is_last and not result.followed:
                    return
        finally:
            with self._changed:
                caller.has_left = True
                self._waiting = [each for each in self._waiting if each.caller is not caller]

    def recall(self, epoch: int) -> int:
        """Give back the whole passes of earlier epochs that wait and have not begun. Returns how many there were.

        They end with CommandRefusedError. A pass either begins and ends here, or is given back, and then never begins.
        """
        with self._changed:
            recalled = [each for each in self._waiting if each.whole and not each.done and each.work.epoch < epoch]
            self._waiting = [each for each in self._waiting if each not in recalled]
        error = CommandRefusedError(RECALLED, f"it had not begun when its epoch gave way to epoch {epoch}")
        _give([(each, error) for each in recalled])
        return len(recalled)

    def close(self) -> None:
        """Stop the thread after the running batch."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def load(self, block: int, content: bytes) -> None:
        """Load a block unless it is loaded; CapacityError if it does not fit."""
        if block not in self.engine.blocks:
            self.memory.ensure_block(block)
            self.engine.load(block, content)

    def take_cache(
        self, session: str, block: int, first: int, capacity: int, part: Activation, attempt: int = 0
    ) -> None:
        """Store a part of a session's cache of a block; CapacityError if the cache does not fit."""
        self.permits.ensure_current(session, attempt)
        part.ensure_valid()
        end = first + (part.shape[2] if len(part.shape) > 2 else 0)
        self.memory.ensure_cache(session, block, end, capacity)
        self.engine.import_cache(session, block, first, capacity, part)

    async def held_positions(self, session: str) -> dict[int, int]:
        """The cached positions of a session by block, once no pass of an earlier attempt can change them."""
        running = self._running
        if running and session in running[0]:
            # Shielded: if the caller leaves, the batch must still find its future as it was.
            await asyncio.shield(asyncio.wrap_future(running[1]))
        return self.engine.lengths(session)

    def sessions(self) -> set[str]:
        """Sessions that hold a cache or have a permit here."""
        return self.engine.sessions() | self.permits.sessions()

    def end(self, session: str) -> None:
        """Free a session's caches, and refuse its messages from now on."""
        self.engine.close(session)
        self.permits.end(session)
        self._in_parts.discard(session)
        with self._changed:
            self._pace.ended(session)
            self._changed.notify()  # a batch may wait for this stream

    @property
    def _background(self) -> float:
        return self.hardware.background_utilization if self.hardware else self.background_utilization

    def _forget(self, queued: Waiting) -> None:
        with self._changed:
            self._waiting = [each for each in self._waiting if each is not queued]

    def _work(self) -> None:
        """The executor's thread: run one batch after another."""
        try:
            while batch := self._take():
                _give(self._followed(self._outcomes(batch)))
        except Exception as error:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _followed(self, outcomes: Sequence[tuple[Part, PassResult | Exception]]) -> list[_Outcome]:
        """Queue the passes that follow those of a batch. Returns its outcomes with those who wait for them."""
        with self._changed:
            return [self._begin_next(cast(_Queued, part.waiting), outcome) for part, outcome in outcomes]

    def _begin_next(self, done: _Queued, outcome: PassResult | Exception) -> _Outcome:
        caller = done.caller
        if not isinstance(outcome, PassResult) or not outcome.is_last or caller.has_left:
            return done, outcome
        if not isinstance(outcome.value, Drawn):
            return done, outcome
        try:
            work = caller.follow(outcome.start + outcome.tokens, outcome.value.token_ids)
        except Exception as error:  # a defect must not end the thread, and the caller gets an answer
            _log.exception("what follows a pass is not known because of a defect")
            return done, error
        if work is None:
            return done, outcome
        self._pace.went_on(work.session)
        self._waiting.append(_Queued(work, since_s=time.perf_counter(), caller=caller))
        return done, replace(outcome, followed=True)

    def _take(self) -> Batch | None:
        """Wait for passes and take the next batch; None after `close`."""
        with self._changed:
            if not self._await_batch():
                return None
            now_s = time.perf_counter()
            batch = next_batch(self._waiting, self._pace.chunk_tokens(now_s), self._most_decodes(now_s))
            self._waiting = still_waiting(self._waiting, batch)
            # Set before any check: a new attempt is either seen by this batch, or sees the batch and waits for it.
            self._running = frozenset(part.waiting.work.session for part in batch.parts), Future()
            return batch

    def _await_batch(self) -> bool:
        """Wait for a pass, and for those that should join it; False after `close`."""
        begun_s = math.inf
        while not self._closed:
            wait_s = None
            if self._waiting:
                now_s = time.perf_counter()
                begun_s = min(begun_s, now_s)
                most = self._most_decodes(now_s)
                wait_s = self._pace.join_until_s(self._waiting, begun_s, now_s, most) - now_s
                if wait_s <= 0:
                    return True
            self._changed.wait(wait_s)
        return False

    def _most_decodes(self, now_s: float) -> int:
        """How many streams may share the next pass."""
        # Emulated sessions that share no part of a pass gain nothing together, and would wait for one another.
        shares = self.hardware is None or any(self.hardware.fixed_s.values())
        return self._pace.fair_share(self._waiting[0].work.stages, now_s) if shares else 1

    def _outcomes(self, batch: Batch) -> list[tuple[Part, PassResult | Exception]]:
        """Run a batch. A pass that ends with an error leaves the line, whatever is left of it."""
        begun = _Begun(time.perf_counter(), self._background)
        try:
            outcomes = self._run(batch, begun)
        except Exception as error:  # a defect must not end the thread, and everybody gets an answer
            _log.exception("a batch failed because of a defect")
            outcomes = [(part, error) for part in batch.parts]
        ended_s = time.perf_counter()
        self.busy_s += begun.node_s(ended_s - begun.at_s)
        for part, outcome in outcomes:
            session = part.waiting.work.session
            part.waiting.done += part.tokens
            part.waiting.since_s = ended_s
            if isinstance(outcome, Exception):
                self._forget(part.waiting)
            if self.permits.has_ended(session):  # during this batch, which may have created caches again
                self.engine.close(session)
        assert self._running is not None
        _, done = self._running
        self._running = None
        done.set_result(None)
        return outcomes

    def _run(self, batch: Batch, begun: _Begun) -> list[tuple[Part, PassResult | Exception]]:
        """Check each pass, and run those that may run together."""
        refused: list[tuple[Part, PassResult | Exception]] = []
        runnable: list[Part] = []
        for part in batch.parts:
            work = part.waiting.work
            try:
                self.permits.ensure_current(work.session, work.attempt)
                end = work.start + part.waiting.done + part.tokens
                self.memory.ensure_caches(work.session, work.first, work.last, end, work.capacity)
                runnable.append(part)
            except ResplitError as error:
                refused.append((part, error))
        return [*refused, *(self._timed(replace(batch, parts=runnable), begun) if runnable else [])]

    def _timed(self, batch: Batch, begun: _Begun) -> list[tuple[Part, PassResult | Exception]]:
        """Run a batch, padded on emulated hardware, and keep the timings of its blocks."""
        load = Load(batch.decodes, batch.prefill_tokens)
        padding = Padding(self.hardware, self.errors) if self.hardware else None
        ends_s = [begun.at_s]

        def after_block(block: int) -> None:
            kind = self.engine.kinds[block]
            ends_s.append(padding.after_block(kind, load) if padding else time.perf_counter())

        answers = self.engine.run(batch.first, batch.last, [part.rows() for part in batch.parts], after_block)
        results = [self._result(part, answer) for part, answer in zip(batch.parts, answers, strict=True)]
        computed_s = begun.computed_s()
        if len(ends_s) > 1:  # else no pass of the batch could run
            if padding:
                padding.finish()
            self._record(batch, begun, padding.ends_s(ends_s[-1]) if padding else ends_s)
            self._pace.ran(batch, begun.node_s(computed_s), time.perf_counter())
        first_half_s = max(0.0, ends_s[len(ends_s) // 2] - begun.at_s) if len(ends_s) > 2 else 0.0
        took = BatchTime(0.0, computed_s, load, begun.background_utilization, first_half_s)
        return [
            (part, _with_time(part, result, begun, took)) for part, result in zip(batch.parts, results, strict=True)
        ]

    def _result(self, part: Part, answer: Activation | ResplitError) -> PassResult | ResplitError:
        """What a part of a pass gives: hidden states, the sampled tokens, nothing, or an error."""
        work, start = part.waiting.work, part.waiting.work.start + part.waiting.done
        if isinstance(answer, ResplitError):
            return answer
        value: Activation | Drawn | None = answer
        if work.sampling is not None:
            try:
                value = _drawn(part, answer)
            except ResplitError as error:
                return error
        return PassResult(start, part.tokens, value, part.is_last)

    def _record(self, batch: Batch, begun: _Begun, ends_s: list[float]) -> None:
        """Keep the timing of one block of each kind, a different one in each pass: blocks of a kind take equal times.

        Block `first + i` ran from `ends_s[i]` to `ends_s[i + 1]`. A pass that mixes decode steps and a prompt is not
        recorded, because it is of neither phase; nor is one that is stepwise.
        """
        sessions = len(batch.parts)
        if 0 < batch.decodes < sessions or any(part.waiting.work.stepwise for part in batch.parts):
            return
        kinds: dict[str, list[int]] = {}
        for block in range(batch.first, batch.last + 1):
            kinds.setdefault(self.engine.kinds[block], []).append(block)
        now_s, phase = time.time(), "decode" if batch.decodes else "prefill"
        tokens = sum(part.tokens for part in batch.parts)
        contexts = [part.waiting.work.start + part.waiting.done for part in batch.parts]
        for blocks in kinds.values():
            index = blocks[self._passes % len(blocks)] - batch.first
            seconds = begun.node_s(ends_s[index + 1] - ends_s[index])
            context_tokens = round(sum(contexts) / sessions)
            self.timings.append(Timing(now_s, batch.first + index, phase, tokens, context_tokens, sessions, seconds))
        self._passes += 1


def _drawn(part: Part, logits: Activation) -> Drawn | None:
    """What the head gives for a part of a pass: tokens for the last one, log probabilities if they are wanted."""
    work, ends = part.waiting.work, part.is_last and not part.waiting.work.more
    scored = work.scored[part.waiting.done : part.waiting.done + part.tokens]
    tokens: tuple[int, ...] = ()
    if ends:
        first = work.start + part.waiting.done + part.tokens - 1 - work.drafts
        tokens = sample(logits, work.sampling or Sampling(), first, work.changes, work.drafts + 1)
    if work.most_likely is None:
        return Drawn(tokens) if ends else None
    return Drawn(tokens, logprobs(logits, (*scored, *tokens), work.most_likely))


def _give(outcomes: Sequence[_Outcome]) -> None:
    """Give outcomes to those who wait for them: all at once, because each call wakes an event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for queued, outcome in outcomes:
        by_loop.setdefault(queued.caller.loop, []).append((queued, outcome))
    for loop, results in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_put, results)


def _put(results: Sequence[_Outcome]) -> None:
    for queued, result in results:
        queued.caller.results.put_nowait(result)


def _with_time(
    part: Part, result: PassResult | ResplitError, begun: _Begun, took: BatchTime
) -> PassResult | ResplitError:
    if isinstance(result, ResplitError):
        return result
    waited_s = max(0.0, begun.at_s - part.waiting.since_s)
    return replace(result, time=replace(took, waited_s=waited_s))
