"""Runs passes on the engine in one thread, many sessions at once, and measures how busy the node is."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, cast

import structlog

from resplit.errors import RECALLED, CommandRefusedError, ResplitError
from resplit.model.activation import Activation
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.sampling import Drawn, logprobs, sample
from resplit.node.batching import (
    Batch,
    ChunkPace,
    Half,
    Part,
    SegmentPass,
    Waiting,
    in_order,
    next_batch,
    still_waiting,
)
from resplit.node.computing import computed
from resplit.node.emulation import Hardware, Load, Padding, WakeDelay
from resplit.node.memory import Memory
from resplit.node.pass_results import (
    BatchTime,
    Follow,
    Outcome,
    PassResult,
    PassWaiter,
    Queued,
    SendOn,
    by_event_loop,
    give,
    nothing_follows,
)
from resplit.node.permits import Permits
from resplit.node.timings import Timing, timings_of
from resplit.types import Sampling

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Begun:
    """When a batch began, and the share of the node that others used then."""

    at_s: float
    background_utilization: float

    def elapsed_s(self) -> float:
        """Seconds on the clock since then."""
        return time.perf_counter() - self.at_s

    def node_s(self, seconds: float) -> float:
        """Seconds on the clock without what background load added."""
        return seconds * (1 - self.background_utilization)


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
        self._wake_delay = WakeDelay()
        self._waiting: list[Queued] = []  # guarded by `_changed`
        self._changed = threading.Condition()
        self._in_parts: set[str] = set()  # sessions of whose pass the first parts came, and the last one has not
        self._closed = False
        self._recorded = 0  # batches of which timings were kept
        self._running: tuple[frozenset[str], Future[None]] | None = None  # sessions and end of the running batch
        self._pace = ChunkPace()
        self.ended: Future[None] = Future()  # of the thread; with its error if a defect ended it
        self._thread = threading.Thread(target=self._work, name="executor", daemon=True)
        self._thread.start()

    def submit(
        self,
        work: SegmentPass,
        take: Callable[[PassResult | Exception], None],
        follow: Follow = nothing_follows,
        left_s: float = 0.0,
        send_on: SendOn = by_event_loop,
    ) -> PassWaiter:
        """Run a pass and those that follow it. In this event loop, `take` gets the result of each part as it is done.

        Most passes have one part. `take` raises nothing, and gets nothing more after an error or after `leave`.
        `follow` is asked in the executor's thread, with the lock held under which passes are recalled, so that a pass
        either follows before that, or sees what came before it. `left_s` is left of the request's objective.
        `send_on` is asked in that thread, too: what it sends, `take` does not get.

        The errors are CommandRefusedError for a session that has ended or an old attempt; CapacityError if its caches
        do not fit; DataError for values or positions that do not match what is held. Malformed values raise it at once.
        """
        # Before it waits: a malformed tensor cannot be cut into chunks.
        rows = SessionRows(work.session, work.start, work.capacity, work.values, work.stepwise, work.drafts)
        self.engine.ensure_input(rows, work.first)
        caller = PassWaiter(take, follow, time.perf_counter() + left_s, send_on=send_on)
        self._enqueue([Queued(work, caller=caller)])
        return caller

    def leave(self, caller: PassWaiter) -> None:
        """Give up what a caller still waits for. A pass that has begun ends, and none follows it."""
        with self._changed:
            caller.has_left = True
            self._waiting = [each for each in self._waiting if each.caller is not caller]

    async def shared_pass_s(self, works: Sequence[SegmentPass]) -> float:
        """Run passes of different sessions through one segment together, and with no others.

        Returns their node time in seconds, without the time that background load added. Errors as for `submit`.
        """
        results: asyncio.Queue[PassResult | Exception] = asyncio.Queue()
        callers = [PassWaiter(results.put_nowait) for _ in works]
        self._enqueue(
            [Queued(replace(work, timed=True), caller=caller) for work, caller in zip(works, callers, strict=True)]
        )
        try:
            ended, node_s = 0, math.nan
            while ended < len(works):
                result = await results.get()
                if isinstance(result, Exception):
                    raise result
                assert result.time is not None
                node_s = result.time.node_s if math.isnan(node_s) else node_s
                ended += result.is_last
            return node_s
        finally:
            for caller in callers:
                self.leave(caller)

    def _enqueue(self, queued: Sequence[Queued]) -> None:
        with self._changed:
            for each in queued:
                each.arrives(time.perf_counter(), each.caller.late_s)
                self._pace.arrived(each.work, each.since_s)
                self._note_parts(each)
            self._waiting += queued
            self._changed.notify()

    def _note_parts(self, queued: Queued) -> None:
        session, more = queued.work.session, queued.work.more
        queued.whole = not more and session not in self._in_parts
        (self._in_parts.add if more else self._in_parts.discard)(session)

    def recall(self, epoch: int) -> int:
        """Give back the whole passes of earlier epochs that wait and have not begun. Returns how many there were.

        They end with CommandRefusedError. A pass either begins and ends here, or is given back, and then never begins.
        """
        with self._changed:
            recalled = [each for each in self._waiting if each.whole and not each.has_begun and each.work.epoch < epoch]
            self._waiting = [each for each in self._waiting if each not in recalled]
        error = CommandRefusedError(RECALLED, f"it had not begun when its epoch gave way to epoch {epoch}")
        give([(each, error) for each in recalled])
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
                outcomes = [each for each in self._outcomes(batch) if not _is_sent(*each)]
                give(self._followed(outcomes))
        except Exception as error:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _followed(self, outcomes: Sequence[tuple[Part, PassResult | Exception]]) -> list[Outcome]:
        """Queue the passes that follow those of a batch. Returns its outcomes with those who wait for them."""
        with self._changed:
            return [self._begin_next(cast(Queued, part.waiting), outcome) for part, outcome in outcomes]

    def _begin_next(self, done: Queued, outcome: PassResult | Exception) -> Outcome:
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
        caller.has_results = False
        queued = Queued(work, caller=caller)
        queued.arrives(time.perf_counter(), caller.late_s)
        self._waiting.append(queued)
        return done, replace(outcome, followed=True)

    def _take(self) -> Batch | None:
        """Wait for passes and take the next batch; None after `close`."""
        with self._changed:
            if not self._await_batch():
                return None
            now_s = time.perf_counter()
            chunk_tokens = self._pace.chunk_tokens(now_s, self._waiting)
            # Emulated hardware computes as in the simulator, where a chunk takes the declared time of its tokens.
            halve = self.hardware is None and self._pace.must_halve(chunk_tokens)
            batch = next_batch(self._waiting, chunk_tokens, self._most_decodes(now_s), halve)
            self._waiting = still_waiting(self._waiting, batch, now_s)
            # Set before any check: a new attempt is either seen by this batch, or sees the batch and waits for it.
            self._running = frozenset(part.waiting.work.session for part in batch.parts), Future()
            return batch

    def _await_batch(self) -> bool:
        """Wait for a pass, and for those that should join it; False after `close`."""
        begun_s = math.inf
        while not self._closed:
            wait_s = None
            if self._waiting:
                self._waiting = in_order(self._waiting)
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
        """Run a batch. A pass that ends with an error leaves the line, whatever is left of it.

        A part that has run through the first half of the blocks has no outcome yet.
        """
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
            part.waiting.done += part.done_tokens
            part.waiting.since_s = ended_s
            if isinstance(outcome, Exception):
                self._forget(part.waiting)
            if self.permits.has_ended(session):  # during this batch, which may have created caches again
                self.engine.close(session)
        assert self._running is not None
        _, done = self._running
        self._running = None
        done.set_result(None)
        return [(part, outcome) for part, outcome in outcomes if outcome is not None]

    def _run(self, batch: Batch, begun: _Begun) -> list[tuple[Part, PassResult | Exception | None]]:
        """Check each pass, and run those that may run together."""
        refused: list[tuple[Part, PassResult | Exception | None]] = []
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

    def _timed(self, batch: Batch, begun: _Begun) -> list[tuple[Part, PassResult | Exception | None]]:
        """Run a batch, padded on emulated hardware, and keep the timings of its blocks."""
        load = Load(batch.decodes, batch.prefill_tokens)
        padding = Padding(self.hardware, self.errors, self._wake_delay) if self.hardware else None
        ends_s = [0.0]  # of the blocks, from the begin of the batch

        def after_block(block: int) -> None:
            if padding:
                padding.after_block(self.engine.kinds[block], load)
            ends_s.append(begun.elapsed_s())

        answers = computed(self.engine, batch, after_block)
        has_run = len(ends_s) > 1  # else no pass of the batch could
        if padding and has_run:
            ends_s = padding.finish()
        results = [self._result(part, answer) for part, answer in zip(batch.parts, answers, strict=True)]
        elapsed_s = begun.elapsed_s()
        if has_run:
            self._record(batch, begun, ends_s)
            self._pace.ran(batch, begun.node_s(elapsed_s), time.perf_counter())
        # What the host of an emulated node adds is no time of its device.
        computed_s = ends_s[-1] if padding else elapsed_s
        ran_all = len(ends_s) - 1 == batch.last - batch.first + 1 > 1
        first_half_s = ends_s[batch.second_half - batch.first] if ran_all else 0.0
        late_s, background = max(0.0, elapsed_s - computed_s), begun.background_utilization
        took = BatchTime(late_s, computed_s, load, background, first_half_s, batch.prompt_half)
        return [
            (part, _with_time(part, result, begun, took)) for part, result in zip(batch.parts, results, strict=True)
        ]

    def _result(self, part: Part, answer: Activation | ResplitError) -> PassResult | ResplitError | None:
        """What a part of a pass gives: hidden states, the sampled tokens, nothing, or an error.

        None for a part whose second half is still to come.
        """
        work, start = part.waiting.work, part.waiting.work.start + part.waiting.done
        if isinstance(answer, ResplitError):
            return answer
        part.waiting.halfway = answer if part.half is Half.FIRST else None
        if part.half is Half.FIRST:
            return None
        value: Activation | Drawn | None = answer
        if work.sampling is not None:
            try:
                value = _drawn(part, answer)
            except ResplitError as error:
                return error
        return PassResult(start, part.tokens, value, part.is_last)

    def _record(self, batch: Batch, begun: _Begun, ends_s: Sequence[float]) -> None:
        """Keep timings of a batch whose block `first + i` ran from `ends_s[i]` to `ends_s[i + 1]` after its begin."""
        block_s = [begun.node_s(end_s - start_s) for start_s, end_s in itertools.pairwise(ends_s)]
        timings = timings_of(batch, self.engine.kinds, block_s, self._recorded, time.time())
        self.timings += timings
        self._recorded += bool(timings)


def _is_sent(part: Part, outcome: PassResult | Exception) -> bool:
    return cast(Queued, part.waiting).caller.is_sent(outcome)


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


def _with_time(
    part: Part, result: PassResult | ResplitError | None, begun: _Begun, took: BatchTime
) -> PassResult | ResplitError | None:
    if result is None or isinstance(result, ResplitError):
        return result
    waited_s = max(0.0, begun.at_s - part.waiting.since_s)
    return replace(result, time=replace(took, waited_s=took.waited_s + waited_s))
