"""Passes that wait and have not begun are given back: each pass runs once, here or after it was given back."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import RECALLED, CommandRefusedError
from resplit.model.activation import Activation, token_ids
from resplit.model.engines import open_engine
from resplit.model.engines.base import SessionRows
from resplit.model.sampling import Drawn
from resplit.model.source import StoredModel
from resplit.node.batching import LONGEST_CHUNK, SegmentPass
from resplit.node.executor import Executor
from resplit.types import Sampling
from tests.support.executor_results import results_of
from tests.support.properties import examples

LAST = 7


class Gated:
    """An executor whose batches begin one by one, when they may; `begun` counts the passes that did."""

    def __init__(self, model: StoredModel) -> None:
        engine = open_engine(model.spec)
        for index, block in enumerate(engine.features):
            engine.load(index, model.content(block.name))
        self.begun: Counter[tuple[str, int]] = Counter()
        self._may_begin = threading.Semaphore(0)
        compute = engine.run

        def run(first: int, last: int, batch: Sequence[SessionRows], after: Callable[[int], None]) -> list[Any]:
            self.begun.update((rows.session, rows.start) for rows in batch)
            self._may_begin.acquire()
            return compute(first, last, batch, after)

        engine.run = run  # type: ignore[method-assign]
        self.executor = Executor(engine, math.inf, None)

    def let_begin(self, batches: int) -> None:
        self._may_begin.release(batches)

    def close(self) -> None:
        self.executor.close()
        self.let_begin(1000)


def whole(session: str, start: int, tokens: list[int], epoch: int, **more: Any) -> SegmentPass:
    return SegmentPass(session, 0, LAST, start, 64, token_ids(tokens), Sampling(), epoch=epoch, **more)


async def answer(executor: Executor, work: SegmentPass) -> tuple[int, ...]:
    """The tokens of a pass."""
    values = [result.value async for result in results_of(executor, work)]
    assert isinstance(values[-1], Drawn)
    return values[-1].token_ids


async def generated(gated: Gated, session: str, count: int, epoch: list[int], ahead: int) -> list[int]:
    """Tokens of a session that repeats a pass in the newest epoch if it was given back.

    Up to `ahead` passes follow each that it begins, as long as the epoch is the newest.
    """
    tokens, step, start = list[int](), [len(session) + 1, 2, 3], 0
    while len(tokens) < count:
        now, until = epoch[0], start + len(step) + min(ahead, count - len(tokens) - 1)

        def follow(end: int, new: tuple[int, ...], now: int = now, until: int = until) -> SegmentPass | None:
            return whole(session, end, list(new), now) if end < until and epoch[0] == now else None

        try:
            async for result in results_of(gated.executor, whole(session, start, step, now), follow):
                assert isinstance(result.value, Drawn)
                start, step = result.start + result.tokens, list(result.value.token_ids)
                tokens += step
        except CommandRefusedError as error:
            if error.reason != RECALLED:
                raise
    return tokens


@given(st.lists(st.sampled_from(["batch", "recall"]), max_size=12), st.integers(1, 5), st.integers(0, 3))
@examples(12)
def test_every_pass_begins_once_and_no_token_changes_whenever_passes_are_given_back(
    stored_model: StoredModel, events: list[str], sessions: int, ahead: int
) -> None:
    async def run(events: list[str]) -> tuple[list[list[int]], Counter[tuple[str, int]]]:
        gated, epoch = Gated(stored_model), [1]
        names = ["s" * (number + 1) for number in range(sessions)]
        running = [asyncio.create_task(generated(gated, name, 3, epoch, ahead)) for name in names]
        try:
            for event in events:
                await asyncio.sleep(0)
                if event == "batch":
                    gated.let_begin(1)
                else:
                    epoch[0] += 1
                    gated.executor.recall(epoch[0])
            gated.let_begin(1000)
            return await asyncio.gather(*running), gated.begun
        finally:
            gated.close()

    tokens, begun = asyncio.run(run(events))
    undisturbed, _ = asyncio.run(run([]))
    assert tokens == undisturbed
    assert set(begun.values()) == {1}
    assert len(begun) == 3 * sessions


async def test_only_what_waits_is_given_back(stored_model: StoredModel) -> None:
    gated = Gated(stored_model)
    first = asyncio.create_task(answer(gated.executor, whole("first", 0, [1, 2], 1)))
    while not gated.begun:  # noqa: ASYNC110 - another thread begins it
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(answer(gated.executor, whole(name, 0, [1, 2], 1))) for name in ("b", "c")]
    newer = asyncio.create_task(answer(gated.executor, whole("newer", 0, [1, 2], 2)))
    await asyncio.sleep(0)
    assert gated.executor.recall(2) == 2
    gated.let_begin(1000)
    for task in others:
        with pytest.raises(
            CommandRefusedError, match=r"recalled\): it had not begun when its epoch gave way to epoch 2"
        ):
            await task
    assert await first == await newer
    assert gated.executor.recall(3) == 0
    assert {session for session, _ in gated.begun} == {"first", "newer"}
    gated.close()


async def test_a_pass_that_follows_is_given_back_too_and_none_follows_in_an_older_epoch(
    stored_model: StoredModel,
) -> None:
    gated, epoch = Gated(stored_model), [1]

    def follow(end: int, new: tuple[int, ...]) -> SegmentPass | None:
        return whole("s", end, list(new), 1) if epoch[0] == 1 else None

    running = results_of(gated.executor, whole("s", 0, [1, 2], 1), follow)
    gated.let_begin(1)
    assert (await anext(running)).followed
    epoch[0] = 2
    gated.let_begin(1)
    assert not (await anext(running)).followed
    assert [result async for result in running] == []
    assert sum(gated.begun.values()) == 2
    gated.close()


async def test_nothing_follows_for_a_caller_that_has_left(stored_model: StoredModel) -> None:
    gated = Gated(stored_model)
    running = results_of(gated.executor, whole("s", 0, [1, 2], 1), lambda end, new: whole("s", end, list(new), 1))
    gated.let_begin(1)
    assert (await anext(running)).followed
    while gated.begun["s", 2] == 0:  # noqa: ASYNC110 - another thread begins it
        await asyncio.sleep(0.001)
    await running.aclose()
    gated.let_begin(1000)
    assert await answer(gated.executor, whole("other", 0, [1, 2], 1))
    assert {start for session, start in gated.begun if session == "s"} == {0, 2}
    gated.close()


async def test_a_pass_whose_first_chunk_runs_is_not_given_back(stored_model: StoredModel) -> None:
    gated = Gated(stored_model)
    prompt = [position % 50 for position in range(LONGEST_CHUNK + 9)]
    work = SegmentPass("s", 0, LAST, 0, 256, token_ids(prompt), Sampling(), epoch=1)
    running = asyncio.create_task(answer(gated.executor, work))
    while not gated.begun:  # noqa: ASYNC110 - another thread begins it
        await asyncio.sleep(0.001)
    assert gated.executor.recall(2) == 0
    gated.let_begin(1000)
    assert await running
    gated.close()


async def test_a_part_of_a_pass_is_not_given_back(stored_model: StoredModel) -> None:
    """Its other parts may have begun, here or behind."""
    gated = Gated(stored_model)
    prompt = list(range(1, 10))
    first = whole("s", 0, prompt[:8], 1, more=True)
    rest = whole("s", 8, prompt[8:], 1)

    async def ended(work: SegmentPass) -> Activation | Drawn | None:
        return [result.value async for result in results_of(gated.executor, work)][-1]

    tasks = [asyncio.create_task(ended(work)) for work in (first, rest)]
    await asyncio.sleep(0)
    assert gated.executor.recall(2) == 0
    gated.let_begin(1000)
    assert await tasks[0] is None
    token = await tasks[1]
    assert isinstance(token, Drawn)
    step = asyncio.create_task(ended(whole("s", 9, list(token.token_ids), 1)))
    await asyncio.sleep(0)
    await step
    gated.close()
