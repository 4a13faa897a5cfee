"""Passes of many sessions at once: the same results as one by one, in order, and nobody waits for a defect."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from resplit.errors import CommandRefusedError, DataError
from resplit.model.activation import Activation, token_ids
from resplit.model.engines.base import SessionRows
from resplit.model.sampling import Drawn
from resplit.model.source import StoredModel
from resplit.node.batching import SegmentPass
from resplit.node.emulation import Load
from resplit.node.executor import Executor
from resplit.node.pass_results import PassResult
from resplit.pass_times import SegmentTime
from resplit.types import Sampling
from resplit.wire.permits import Permit
from tests.support.engines import stored_engine
from tests.support.executor_results import results_of

LAST = 7
PROMPT = [(5 * position) % 50 for position in range(75)]


@pytest.fixture
def executor(stored_model: StoredModel) -> Iterator[Executor]:
    executor = Executor(stored_engine(stored_model), math.inf, None)
    yield executor
    executor.close()


def whole(session: str, start: int, tokens: list[int], **more: Any) -> SegmentPass:
    return SegmentPass(session, 0, LAST, start, 256, token_ids(tokens), Sampling(), **more)


async def results(executor: Executor, work: SegmentPass) -> list[PassResult]:
    return [result async for result in results_of(executor, work)]


async def generated(executor: Executor, session: str, prompt: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    step, start = prompt, 0
    while len(tokens) < count:
        answer = (await results(executor, whole(session, start, step)))[-1].value
        assert isinstance(answer, Drawn)
        start += len(step)
        step = list(answer.token_ids)
        tokens += step
    return tokens


async def test_sessions_at_once_get_the_tokens_that_each_gets_alone(executor: Executor) -> None:
    prompts = [PROMPT[number : 2 * number + 3] for number in range(12)]
    alone = [await generated(executor, f"alone {number}", prompt, 8) for number, prompt in enumerate(prompts)]
    together = await asyncio.gather(
        *(generated(executor, f"together {number}", prompt, 8) for number, prompt in enumerate(prompts))
    )
    assert together == alone


async def test_decode_steps_that_wait_share_a_pass(executor: Executor) -> None:
    for number in range(6):
        await results(executor, whole(str(number), 0, [1, 2, 3]))
    executor.timings.clear()
    await asyncio.gather(*(results(executor, whole(str(number), 3, [4])) for number in range(6)))
    sessions = [timing.sessions for timing in executor.timings if timing.block == LAST]
    assert sum(sessions) == 6
    assert len(sessions) < 6
    assert all(timing.tokens == timing.sessions and timing.context_tokens == 3 for timing in executor.timings)


async def test_a_pass_waits_for_a_stream_that_is_about_to_come_back(executor: Executor) -> None:
    for session in "ab":
        await results(executor, whole(session, 0, [1, 2, 3]))
    await asyncio.gather(*(results(executor, whole(session, 3, [4])) for session in "ab"))
    executor._pace._gap_s = executor._pace._away_s = 1e4  # so long that only what the test does ends the wait
    executor._pace._gap_s *= 100
    first = asyncio.create_task(results(executor, whole("a", 4, [5])))
    await asyncio.sleep(0)  # until it waits for the pass
    assert not first.done()
    await results(executor, whole("b", 4, [5]))
    executor._pace._away_s = 1e4
    last = asyncio.create_task(results(executor, whole("a", 5, [6])))
    await asyncio.sleep(0)  # until it waits for the pass
    executor.end("b")
    times = [results[0].time for results in (await first, await last)]
    assert [each.load for each in times if each] == [Load(2, 0), Load(1, 0)]


def following(session: str, until: int) -> Callable[[int, tuple[int, ...]], SegmentPass | None]:
    """Has a session go on with the tokens drawn, up to a position."""
    return lambda end, tokens: whole(session, end, list(tokens)) if end < until else None


async def followed(executor: Executor, session: str, until: int) -> list[PassResult]:
    return [result async for result in results_of(executor, whole(session, 3, [4]), following(session, until))]


async def test_passes_follow_one_another_with_the_same_tokens_without_a_turn_of_the_event_loop(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = "abcd"
    for session in sessions:
        await results(executor, whole(session, 0, [1, 2, 3]))
    monkeypatch.setattr(executor, "_most_decodes", lambda now_s: len(sessions))
    with executor._changed:  # the first passes come together
        streams = [asyncio.create_task(followed(executor, session, 12)) for session in sessions]
        await asyncio.sleep(0)
    while set(executor.engine.lengths("a").values()) != {12}:
        time.sleep(0.001)  # noqa: ASYNC251 - the event loop may not help
    done = await asyncio.gather(*streams)
    for each in done:
        assert [(result.start, result.followed) for result in each] == [(at, at < 11) for at in range(3, 12)]
        assert [result.time.load.decodes for result in each if result.time] == [len(sessions)] * 9
        assert [result.value for result in each] == [result.value for result in done[0]]
    alone = await generated(executor, "alone", [1, 2, 3, 4], 9)
    assert len(set(alone)) > 1  # a follow-up with an older token would show
    again = [
        result.value async for result in results_of(executor, whole("again", 0, [1, 2, 3, 4]), following("again", 12))
    ]
    assert [value.token_ids for value in again if isinstance(value, Drawn)] == [(token,) for token in alone]


async def test_a_defect_in_what_follows_is_answered_and_stops_no_other(executor: Executor) -> None:
    def defective(end: int, token_ids: tuple[int, ...]) -> SegmentPass:
        raise ValueError("not known")

    running = results_of(executor, whole("s", 0, [1, 2]), defective)
    with pytest.raises(ValueError, match="not known"):
        await anext(running)
    assert len(await results(executor, whole("s", 2, [1]))) == 1


async def test_each_part_of_a_pass_says_how_long_it_waited_and_what_its_batch_computed(executor: Executor) -> None:
    first, second = await results(executor, whole("prompt", 0, [*PROMPT, *PROMPT]))
    assert first.time is not None
    assert second.time is not None
    assert [each.load for each in (first.time, second.time)] == [Load(0, 128), Load(0, 22)]
    waiting = await asyncio.gather(*(results(executor, whole(name, 150, [4])) for name in ("prompt",)))
    assert waiting[0][0].time is not None
    assert waiting[0][0].time.load == Load(1, 0)
    begun_s = time.perf_counter()
    one, other = await asyncio.gather(
        results(executor, whole("one", 0, PROMPT)), results(executor, whole("other", 0, PROMPT))
    )
    spent_s = time.perf_counter() - begun_s
    times = [one[-1].time, other[-1].time]
    assert all(each is not None and each.computed_s > 0 for each in times)
    # Prompts run one after the other, so the second one waits while the first one computes.
    assert times[1].waited_s >= times[0].computed_s  # type: ignore[union-attr]
    assert times[1].waited_s + times[1].computed_s <= spent_s  # type: ignore[union-attr]


async def test_a_long_prompt_is_answered_once_at_its_end_with_the_same_token(executor: Executor) -> None:
    *chunks, last = await results(executor, whole("chunks", 0, [*PROMPT, *PROMPT]))
    assert [(chunk.start, chunk.tokens, chunk.value, chunk.is_last) for chunk in chunks] == [(0, 128, None, False)]
    assert (last.start, last.tokens, last.is_last) == (128, 22, True)
    for first, tokens in ((0, PROMPT[:48]), (48, PROMPT[48:])):
        (part,) = await results(executor, whole("parts", first, tokens, more=first == 0))
        assert part.value is None or first
    (rest,) = await results(executor, whole("parts", 75, PROMPT))
    assert rest.value == last.value


async def test_hidden_states_are_sent_on_in_the_thread_until_the_event_loop_has_to(executor: Executor) -> None:
    asked: list[tuple[int, bool]] = []  # starts of parts, and whether the event loop's thread was asked
    taken: asyncio.Queue[PassResult | Exception] = asyncio.Queue()
    loop_thread = threading.get_ident()

    def send_on(result: PassResult) -> bool:
        asked.append((result.start, threading.get_ident() == loop_thread))
        return len(asked) < 2

    work = SegmentPass("s", 0, LAST - 1, 0, 384, token_ids(PROMPT * 5), None)
    executor.submit(work, taken.put_nowait, send_on=send_on)
    starts: list[int] = []
    while True:
        result = await asyncio.wait_for(taken.get(), 10)
        assert isinstance(result, PassResult)
        starts.append(result.start)
        if result.is_last:
            break
    assert asked == [(0, False), (128, False)], "the third part would overtake the second one"
    assert starts == [128, 256]


async def test_hidden_states_of_a_follow_up_are_sent_on_in_the_thread_though_a_token_was_not(
    executor: Executor,
) -> None:
    sent: asyncio.Queue[PassResult] = asyncio.Queue()
    taken: asyncio.Queue[PassResult | Exception] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def send_on(result: PassResult) -> bool:
        if isinstance(result.value, Drawn):
            return False
        loop.call_soon_threadsafe(sent.put_nowait, result)
        return True

    def follow(end: int, token_ids_drawn: tuple[int, ...]) -> SegmentPass | None:
        return SegmentPass("s", 0, LAST - 1, end, 256, token_ids(token_ids_drawn), None)

    executor.submit(whole("s", 0, [1, 2, 3]), taken.put_nowait, follow, send_on=send_on)
    hidden = await asyncio.wait_for(sent.get(), 10)
    assert (hidden.start, isinstance(hidden.value, Activation)) == (3, True)
    drawn = await asyncio.wait_for(taken.get(), 10)
    assert isinstance(drawn, PassResult)
    assert drawn.followed
    assert taken.empty()


async def test_parts_of_hidden_states_are_yielded_as_they_are_done(executor: Executor) -> None:
    work = SegmentPass("s", 0, 3, 0, 256, token_ids([*PROMPT, *PROMPT]), None)
    parts = await results(executor, work)
    assert [part.value.shape for part in parts if isinstance(part.value, Activation)] == [(1, 128, 64), (1, 22, 64)]


async def test_a_refused_pass_stops_no_other(executor: Executor) -> None:
    executor.end("ended")
    await results(executor, whole("good", 0, [1, 2, 3]))
    outcomes = await asyncio.gather(
        results(executor, whole("good", 3, [4])),
        results(executor, whole("gap", 9, [4])),
        results(executor, whole("ended", 0, [4])),
        results(executor, whole("unknown token", 0, [10**6])),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [list, DataError, CommandRefusedError, DataError]


async def test_after_a_defect_everybody_gets_an_answer_and_the_next_pass_runs(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(executor.engine, "run", broken)
        with pytest.raises(RuntimeError, match="a defect"):
            await results(executor, whole("s", 0, [1, 2]))
    assert len(await results(executor, whole("s", 0, [1, 2]))) == 1


async def test_a_pass_that_nobody_waits_for_any_more_leaves_the_line(executor: Executor) -> None:
    tasks = [asyncio.create_task(results(executor, whole(str(n), 0, PROMPT))) for n in range(6)]
    await asyncio.sleep(0)
    for task in tasks[2:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert executor._waiting == []


async def test_a_new_attempt_waits_for_the_pass_that_runs(executor: Executor) -> None:
    running = asyncio.create_task(results(executor, whole("s", 0, PROMPT)))
    while executor._running is None and not running.done():  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0)
    executor.permits.give("s", Permit(1, 64))
    lengths = await executor.held_positions("s")
    assert set(lengths.values()) <= {0, len(PROMPT)}
    await asyncio.gather(running, return_exceptions=True)
    assert executor.engine.lengths("s") == lengths


async def test_a_caller_that_leaves_while_it_waits_for_a_batch_stops_nothing(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    await results(executor, whole("s", 0, [1, 2, 3]))
    begun, go_on, run = threading.Event(), threading.Event(), executor.engine.run

    def slowly(*arguments: Any) -> Any:
        begun.set()
        go_on.wait()
        return run(*arguments)

    monkeypatch.setattr(executor.engine, "run", slowly)
    decoding = asyncio.create_task(results(executor, whole("s", 3, [4])))
    await asyncio.to_thread(begun.wait)
    leaving = asyncio.create_task(executor.held_positions("s"))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    go_on.set()
    async with asyncio.timeout(10):
        await decoding
        assert len(await results(executor, whole("s", 4, [5]))) == 1


@pytest.mark.parametrize("blocks", [2, 3, 4, 5])
async def test_the_first_half_of_a_segment_is_timed_over_its_blocks(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    ends_s: list[float] = []
    compute = executor.engine.run

    def run(first: int, last: int, batch: Sequence[SessionRows], after: Callable[[int], None]) -> list[Any]:
        ends_s.append(time.perf_counter())

        def after_block(block: int) -> None:
            after(block)
            ends_s.append(time.perf_counter())
            time.sleep(0.01)  # so that blocks are told apart by their ends

        return compute(first, last, batch, after_block)

    monkeypatch.setattr(executor.engine, "run", run)
    hidden = executor.engine.blank_input(1, 1)
    (result,) = await results(executor, SegmentPass("s", 1, blocks, 0, 64, hidden, None))
    assert result.time is not None
    took, begun_s = result.time, ends_s[0]
    timed = min(range(blocks + 1), key=lambda index: abs(ends_s[index] - begun_s - took.first_half_s))
    first, _ = SegmentTime("node", 1, blocks, 0.0, took.computed_s, 0.0, 1, 0, took.first_half_s).halves()
    assert timed == first.last - first.first + 1
