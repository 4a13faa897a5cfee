"""Which waiting passes run together next (continuous batching). Pure: the executor asks, and runs the answer.

Decode steps of all sessions share a pass, and join at any time. Prompts run in chunks between them, so that a long
prompt delays running streams by little. What misses its service objective first goes first (`in_order`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TypeVar

from resplit.model.activation import Activation
from resplit.model.engines.base import CHUNK_TOKENS, SessionRows
from resplit.types import LogitChange, Sampling

MOST_SESSIONS = 32
# A chunk takes at most this many of the usual gaps of the streams that decode meanwhile: if the shortest one takes
# longer, one half of the blocks computes it in a pass. A stream may wait for two chunks: if it is late, its next step
# comes back when the second one has begun.
_MOST_DELAY = 1.5
LONGEST_CHUNK = 16 * CHUNK_TOKENS
# Chunks before this position are not halved: they cost less, and short prompts keep their time to first token.
HALVED_FROM = 256
_SMOOTHING = 0.2  # weight of the newest value
_IDLE_S = 0.25  # a stream's next step may be late by this much; after it, no stream decodes
# A pass waits at most this share of a usual gap for streams that are about to come back, and for each of them at most
# this many of its usual times away.
_MOST_WAIT = 0.2
_LATE = 2.0


class Half(IntEnum):
    """Which blocks of its segment a part of a pass runs through in one batch. The numbers are those on the wire."""

    BOTH = 0
    FIRST = 1
    SECOND = 2


@dataclass(frozen=True)
class SegmentPass:
    """One pass of a session through blocks `first..last`; `sampling` is set if the last of them is the head.

    `start` is the position of the first token, `capacity` the number of tokens that the session may cache. With
    `more`, this is the first part of a longer pass, whose rest follows: nobody waits for its result. `timed`: the pass
    shares its time with other timed passes only. With `stepwise`, it repeats passes that were done one by one,
    or its last `drafts` positions are guesses to be verified. `stages` is the number of segments of the whole route,
    and `epoch` that of the epoch. `changes` are applied to the logits. With `most_likely`, log probabilities are
    wanted: of the tokens drawn, and of `scored`, the tokens after all positions of a prompt but the last one of its
    pass.
    """

    session: str
    first: int
    last: int
    start: int
    capacity: int
    values: Activation
    sampling: Sampling | None
    attempt: int = 0
    more: bool = False
    timed: bool = False
    stepwise: bool = False
    drafts: int = 0
    stages: int = 1
    changes: tuple[LogitChange, ...] = ()
    most_likely: int | None = None
    scored: tuple[int, ...] = ()
    epoch: int = 0

    @cached_property
    def tokens(self) -> int:
        """Tokens in this pass: `values` is (1, tokens) or (1, tokens, width). 0 for a malformed tensor."""
        return self.values.shape[1] if len(self.values.shape) > 1 else 0

    @cached_property
    def decoding(self) -> bool:
        """Whether this is a decode step, perhaps with drafts, not a prefill."""
        return self.start > 0 and self.tokens - self.drafts == 1


@dataclass
class Waiting:
    """A pass that waits; the first `done` of its tokens have been computed in earlier chunks.

    The chunk after them may have run through the first half of the blocks: `halfway` is what that gave. It `has_begun`
    once a batch with a part of it was taken.
    It waits since `since_s`, on the clock of its caller, and its turn counts from `turn_s` on: that of a prompt from
    the last chunk that was taken. When it arrived, `left_s` was left until its request would miss its objective.
    """

    work: SegmentPass
    done: int = 0
    since_s: float = 0.0
    turn_s: float = 0.0
    left_s: float = 0.0
    has_begun: bool = False
    halfway: Activation | None = None

    def arrives(self, now_s: float, late_s: float = 0.0) -> None:
        """It waits from now on. At `late_s` its request misses its objective."""
        self.since_s = self.turn_s = now_s
        self.left_s = max(0.0, late_s - now_s)

    @property
    def due_s(self) -> float:
        """What is due earlier runs earlier. It depends on the arrival, so nobody waits for ever."""
        return self.turn_s + self.left_s

    @property
    def left(self) -> int:
        """Tokens that are not computed yet; at least 1, so that a malformed pass runs and is refused."""
        return max(1, self.work.tokens - self.done)


_Waiting = TypeVar("_Waiting", bound=Waiting)


@dataclass(frozen=True)
class Part:
    """The next `tokens` of a waiting pass, through all blocks of the segment or one half of them."""

    waiting: Waiting
    tokens: int
    half: Half = Half.BOTH

    @property
    def done_tokens(self) -> int:
        """The tokens that have passed the whole segment afterwards."""
        return 0 if self.half is Half.FIRST else self.tokens

    @property
    def is_last(self) -> bool:
        """Whether nothing of the pass is left afterwards."""
        return self.done_tokens >= self.waiting.left

    def rows(self) -> SessionRows:
        """The rows that the engine computes."""
        work, done = self.waiting.work, self.waiting.done
        ends = self.tokens >= self.waiting.left
        if self.half is Half.SECOND and self.waiting.halfway is not None:
            values = self.waiting.halfway
        else:
            values = work.values if done == 0 and ends else _slice(work.values, done, done + self.tokens)
        logits = ends and not work.more
        drafts = work.drafts if ends else 0
        start, scored = work.start + done, bool(work.scored)
        return SessionRows(work.session, start, work.capacity, values, work.stepwise, drafts, logits, scored)


@dataclass(frozen=True)
class Batch:
    """Parts of passes that run together through blocks `first..last`."""

    first: int
    last: int
    parts: list[Part] = field(default_factory=list)

    @property
    def second_half(self) -> int:
        """The first block of the second half of the segment."""
        return self.first + (self.last - self.first + 1) // 2

    @property
    def prompt_half(self) -> Half:
        """Through which of the blocks the prompt runs."""
        return max((part.half for part in self.parts), default=Half.BOTH)

    @property
    def decodes(self) -> int:
        """The number of decode steps. A draft is one too."""
        return sum(part.tokens for part in self.parts if part.waiting.work.decoding)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens in the batch."""
        return sum(part.tokens for part in self.parts if not part.waiting.work.decoding)


def in_order(waiting: Sequence[_Waiting]) -> list[_Waiting]:
    """What waits, in the order in which it is due.

    `waiting` has the passes of each session in order, and they stay so. Nothing overtakes a timed pass.
    """
    if len(waiting) == 1:
        return list(waiting)
    timed = next((index for index, each in enumerate(waiting) if each.work.timed), len(waiting))
    due_s: dict[str, float] = {}  # by session
    for each in waiting[:timed]:
        due_s.setdefault(each.work.session, each.due_s)
    return [*sorted(waiting[:timed], key=lambda each: due_s[each.work.session]), *waiting[timed:]]


def next_batch(
    waiting: Sequence[Waiting], most_tokens: int, most_decodes: int = MOST_SESSIONS, halve: bool = False
) -> Batch:
    """The next batch of `waiting`, which is in order and not empty.

    It runs the segment of the first pass: the decode steps for that segment, `most_decodes` of them at most, and one
    chunk of the first prompt, of at most `most_tokens`. With `halve`, a chunk beside decode steps runs through the
    first half of the blocks in this batch, and through the second half in a later one, unless it is one of the first of
    its prompt. A session has one pass in a batch, its oldest. Timed passes that wait one behind the other run together,
    whole.
    """
    oldest = waiting[0].work
    if oldest.timed:
        return _timed_together(waiting)
    batch = Batch(oldest.first, oldest.last)
    seen: set[str] = set()
    prompt: Waiting | None = None
    for each in waiting:
        work = each.work
        if work.timed:
            break
        if work.session in seen or len(seen) >= MOST_SESSIONS:
            continue
        seen.add(work.session)
        if (work.first, work.last) != (oldest.first, oldest.last):
            continue
        if work.decoding:
            if len(batch.parts) < most_decodes:
                batch.parts.append(Part(each, each.left))
        elif prompt is None:
            prompt = each
    if prompt is not None:
        batch.parts.append(_prompt_part(prompt, most_tokens, halve and len(batch.parts) > 0))
    return batch


def still_waiting(waiting: Sequence[_Waiting], batch: Batch, now_s: float) -> list[_Waiting]:
    """What waits once `batch` has been taken, at `now_s`. What is left of a pass in it has begun.

    A prompt of which more is left goes behind all others, but before later passes of its session.
    """
    if len(waiting) == len(batch.parts) and all(part.is_last for part in batch.parts):
        return []
    taken = {id(part.waiting): part for part in batch.parts}
    left = [each for each in waiting if id(each) not in taken]
    for each in waiting:
        if id(each) in taken and not taken[id(each)].is_last:
            sessions = [other.work.session for other in left]
            session = each.work.session
            each.turn_s, each.has_begun = now_s, True
            left.insert(sessions.index(session) if session in sessions else len(left), each)
    return left


def _timed_together(waiting: Sequence[Waiting]) -> Batch:
    """The timed passes at the front, of different sessions and through the same segment."""
    batch, seen = Batch(waiting[0].work.first, waiting[0].work.last), set[str]()
    for each in waiting:
        work = each.work
        if not work.timed or work.session in seen or (work.first, work.last) != (batch.first, batch.last):
            break
        seen.add(work.session)
        batch.parts.append(Part(each, each.left))
    return batch


class ChunkPace:
    """How fast the streams of a node decode, and how long prompts take: from these follows the length of a chunk."""

    def __init__(self) -> None:
        self._gap_s = 0.0  # between two decode steps of a stream, smoothed
        self._prefill_token_s = 0.0  # smoothed
        self._decodes_s = 0.0  # of a pass with decode steps only, smoothed
        self._last_s = -math.inf  # when a stream decoded last
        self._prefilled_s = -math.inf  # when a prompt ran last
        self._decoded_s: dict[str, float] = {}  # when each stream did
        self._segments: dict[str, tuple[int, int]] = {}  # that each stream passed last
        self._away_s = math.inf  # from a decode step of a stream to its next one for the same segment, smoothed

    def ran(self, batch: Batch, node_s: float, now_s: float) -> None:
        """Note the end of a batch that took the node `node_s`."""
        if batch.prefill_tokens:
            self.prefilled(now_s)
        for part in batch.parts:
            if part.waiting.work.decoding:
                self.decoded(part.waiting.work.session, now_s)
                self._segments[part.waiting.work.session] = batch.first, batch.last
        if batch.prefill_tokens:
            tokens = batch.prefill_tokens / (2 if batch.prompt_half else 1)
            self.timed(tokens, max(0.0, node_s - self._decodes_s) if batch.decodes else node_s)
        else:
            self._decodes_s = _smoothed(self._decodes_s, node_s)

    def decoded(self, session: str, now_s: float) -> None:
        """Note the end of a decode step. A gap during which a prompt ran is not a usual one."""
        before_s = self._decoded_s.get(session)
        if before_s is not None and before_s >= self._prefilled_s:
            self._gap_s = _smoothed(self._gap_s, now_s - before_s)
        self._decoded_s[session] = self._last_s = now_s

    def arrived(self, work: SegmentPass, now_s: float) -> None:
        """Note that a pass came and waits now: a decode step tells how long its stream was away."""
        if work.decoding and self._segments.pop(work.session, None) == (work.first, work.last):
            away_s = now_s - self._decoded_s.get(work.session, now_s)
            self._away_s = away_s if math.isinf(self._away_s) else _smoothed(self._away_s, away_s)

    def went_on(self, session: str) -> None:
        """Note that the next pass of a stream waits as soon as its last one has ended: it was not away."""
        self._segments.pop(session, None)

    def join_until_s(
        self,
        waiting: Sequence[Waiting],
        begun_s: float,
        now_s: float,
        most_decodes: int,
    ) -> float:
        """Until when the next batch should wait for streams that are about to come back for its segment.

        A pass costs much less for one more stream than for a stream alone, and a prompt's chunk that begins just
        before a stream comes back delays it. `begun_s` is when the batch could have begun. `now_s`: begin.
        """
        oldest = waiting[0].work
        segment, latest_s = (oldest.first, oldest.last), begun_s + _MOST_WAIT * self._gap_s
        ready = sum(each.work.decoding and (each.work.first, each.work.last) == segment for each in waiting)
        if oldest.timed or ready >= most_decodes:
            return now_s
        due_s = (self._decoded_s[session] + _LATE * self._away_s for session in self._away(segment))
        return max([now_s, *(due for due in due_s if due <= latest_s)])

    def _away(self, segment: tuple[int, int]) -> list[str]:
        """The streams whose last pass was through `segment`, and that have not come back since."""
        return [session for session, last in self._segments.items() if last == segment]

    def prefilled(self, now_s: float) -> None:
        """Note the end of a pass in which a prompt ran."""
        self._prefilled_s = now_s

    def timed(self, tokens: float, seconds: float) -> None:
        """Note the time that so many prompt tokens took, through all blocks of a segment."""
        self._prefill_token_s = _smoothed(self._prefill_token_s, seconds / tokens)

    def ended(self, session: str) -> None:
        """Forget a stream."""
        self._decoded_s.pop(session, None)
        self._segments.pop(session, None)

    def fair_share(self, stages: int, now_s: float) -> int:
        """How many streams may share a pass, so that every stage of the chain has some to compute.

        If all streams moved together from stage to stage, the others would idle.
        """
        recent_s = max(_IDLE_S, 4 * self._gap_s)
        active = sum(now_s - decoded_s <= recent_s for decoded_s in self._decoded_s.values())
        return max(1, math.ceil(active / stages))

    def chunk_tokens(self, now_s: float, waiting: Sequence[Waiting] = ()) -> int:
        """How many tokens of a prompt may run in one pass: few while streams decode, many while none does.

        After a long chunk no stream has decoded for long, but one may be among those `waiting`.
        """
        stream_waits = any(each.work.decoding for each in waiting)
        idle = not stream_waits and now_s - self._last_s > max(_IDLE_S, 4 * self._gap_s)
        if idle or not self._gap_s or not self._prefill_token_s:
            return LONGEST_CHUNK
        affordable = _MOST_DELAY * self._gap_s / self._prefill_token_s
        return int(min(LONGEST_CHUNK, max(1, affordable // CHUNK_TOKENS) * CHUNK_TOKENS))

    def must_halve(self, tokens: int) -> bool:
        """Whether a chunk of so many tokens, which cannot be shorter, delays the streams too much in one pass."""
        return bool(self._gap_s) and tokens * self._prefill_token_s > _MOST_DELAY * self._gap_s


def _smoothed(before: float, value: float) -> float:
    return before + _SMOOTHING * (value - before) if before else value


def _prompt_part(prompt: Waiting, most_tokens: int, halve: bool) -> Part:
    if prompt.halfway is not None:
        return Part(prompt, prompt.halfway.shape[1], Half.SECOND)
    halve = halve and prompt.work.first < prompt.work.last and prompt.work.start + prompt.done >= HALVED_FROM
    return Part(prompt, _chunk(prompt, most_tokens), Half.FIRST if halve else Half.BOTH)


def _chunk(prompt: Waiting, limit: int) -> int:
    """Tokens of the next chunk: all that are left, or up to a position at which a prompt may be cut."""
    if prompt.left <= limit:
        return prompt.left
    end = prompt.work.start + prompt.done + limit
    return end // CHUNK_TOKENS * CHUNK_TOKENS - prompt.work.start - prompt.done


def _slice(values: Activation, first: int, last: int) -> Activation:
    """Tokens `first..last-1` of token ids (1, tokens) or hidden states (1, tokens, width)."""
    token_bytes = len(values.data) // values.shape[1]
    shape = (1, last - first, *values.shape[2:])
    return Activation(values.dtype, shape, values.data[first * token_bytes : last * token_bytes])
