"""A chunk of a prompt that runs through the blocks in two passes beside a stream: the same bits, and nothing left."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from resplit.errors import CommandRefusedError
from resplit.model.activation import token_ids
from resplit.model.engines.base import SessionRows
from resplit.model.sampling import Drawn
from resplit.node import batching
from resplit.node.batching import SegmentPass
from resplit.node.executor import Executor
from resplit.node.pass_results import PassResult
from resplit.types import Sampling
from resplit.wire.permits import Permit
from tests.model.conftest import unsplit
from tests.support.engines import engine_with
from tests.support.executor_results import results_of

PROMPT = [(7 * position) % 97 for position in range(44)]
STEPS = 40


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return unsplit("llama")


class Halving(Executor):
    """An executor that halves every chunk beside a stream. `ran` has the blocks and sessions of each engine run."""

    def __init__(self, model: torch.nn.Module, engine: str, weights: str) -> None:
        super().__init__(engine_with(model, engine=engine, weights=weights), math.inf, None)
        self._pace.chunk_tokens = lambda now_s, waiting=(): 8  # type: ignore[method-assign]
        self._pace.must_halve = lambda tokens: True  # type: ignore[method-assign]
        self.last = len(self.engine.kinds) - 1
        self.ran: list[tuple[int, int, tuple[str, ...]]] = []
        self.before_run: Callable[[], None] = lambda: None
        compute = self.engine.run

        def run(first: int, last: int, batch: Sequence[SessionRows], after: Callable[[int], None]) -> list[Any]:
            self.ran.append((first, last, tuple(rows.session for rows in batch)))
            self.before_run()
            return compute(first, last, batch, after)

        self.engine.run = run  # type: ignore[method-assign]

    def submitted(self, session: str, first: int, last: int, attempt: int = 0) -> SegmentPass:
        sampling = Sampling() if last == self.last else None
        values = token_ids(PROMPT) if first == 0 else self.engine.blank_input(first, len(PROMPT))
        return SegmentPass(session, first, last, 0, 256, values, sampling, attempt)

    def steps(self, first: int, last: int) -> list[SegmentPass]:
        """Passes of a stream, the first three tokens and then decode steps."""
        tokens = [3, *[1] * STEPS]
        starts = [0, *range(3, 3 + STEPS)]
        values = [token_ids([5] * n) if first == 0 else self.engine.blank_input(first, n) for n in tokens]
        drawn = Sampling() if last == self.last else None
        return [
            SegmentPass("stream", first, last, start, 256, value, drawn)
            for start, value in zip(starts, values, strict=True)
        ]

    async def values(self, work: SegmentPass) -> bytes:
        return b"".join([content(result) async for result in results_of(self, work)])


def content(result: PassResult) -> bytes:
    if isinstance(result.value, Drawn):
        return repr(result.value.token_ids).encode()
    return result.value.data if result.value else b""


@pytest.fixture(params=[("onnx", "int4"), ("onnx", "float32"), ("torch", "float32")])
def executor(
    model: torch.nn.Module, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Halving]:
    monkeypatch.setattr(batching, "HALVED_FROM", 0)
    executor = Halving(model, *request.param)
    yield executor
    executor.close()


async def beside(executor: Halving, work: SegmentPass) -> tuple[bytes, list[bytes]]:
    """What a pass gives beside a stream, whose next step always waits, and what the stream gives."""
    first, *steps = executor.steps(work.first, work.last)
    begun = await executor.values(first)
    executor.ran.clear()
    with executor._changed:  # all come together
        streaming = [asyncio.create_task(executor.values(step)) for step in steps]
        prompt = asyncio.create_task(executor.values(work))
        await asyncio.sleep(0)
    given = await asyncio.gather(*streaming)
    return await prompt, [begun, *given]


@pytest.mark.parametrize("cut", [(0, -1), (0, 2), (1, -1), (1, 2), (2, 2)])
async def test_halves_of_a_chunk_give_the_bits_of_the_prompt_alone(executor: Halving, cut: tuple[int, int]) -> None:
    first, last = cut[0], cut[1] if cut[1] >= 0 else executor.last
    alone = await executor.values(executor.submitted("alone", first, last))
    stream = [await executor.values(step) for step in executor.steps(first, last)]
    executor.engine.close("stream")
    assert await beside(executor, executor.submitted("prompt", first, last)) == (alone, stream)
    ran = [(one, other) for one, other, sessions in executor.ran if "prompt" in sessions]
    half, chunks = first + (last - first + 1) // 2, math.ceil(len(PROMPT) / 8)
    assert ran == (chunks * [(first, half - 1), (half, last)] if first < last else chunks * [(first, last)])


class Stopped:
    """Halts an executor when the first half of a prompt's first chunk was computed, in the batch that computes it."""

    def __init__(self, executor: Halving) -> None:
        self._go_on = threading.Event()
        self.halted = threading.Event()
        self._executor = executor
        executor.before_run = self._before_run

    def _before_run(self) -> None:
        lengths = set(self._executor.engine.lengths("prompt").values())
        if 8 in lengths and not self._go_on.is_set():
            self.halted.set()
            self._go_on.wait(20)

    async def between_halves(self) -> None:
        await asyncio.to_thread(self.halted.wait, 20)
        assert self.halted.is_set()

    def go_on(self) -> None:
        self._go_on.set()


async def test_a_new_attempt_between_the_halves_ends_the_pass_and_gets_the_same_token(executor: Halving) -> None:
    expected = await executor.values(executor.submitted("alone", 0, executor.last))
    stopped = Stopped(executor)
    running = asyncio.create_task(beside(executor, executor.submitted("prompt", 0, executor.last)))
    await stopped.between_halves()
    executor.permits.give("prompt", Permit(1, 256))
    held = asyncio.create_task(executor.held_positions("prompt"))
    await asyncio.sleep(0)
    stopped.go_on()
    assert set((await held).values()) == {8}  # of the blocks of the first half
    with pytest.raises(CommandRefusedError):
        await running
    assert executor._waiting == []
    assert await executor.values(executor.submitted("prompt", 0, executor.last, attempt=1)) == expected


async def test_a_session_that_ends_between_the_halves_leaves_nothing(executor: Halving) -> None:
    stopped = Stopped(executor)
    running = asyncio.create_task(beside(executor, executor.submitted("prompt", 0, executor.last)))
    await stopped.between_halves()
    executor.end("prompt")
    stopped.go_on()
    with pytest.raises(CommandRefusedError):
        await running
    assert "prompt" not in executor.engine.sessions()
    assert [each.work.session for each in executor._waiting if each.work.session == "prompt"] == []


async def test_a_caller_that_leaves_between_the_halves_stops_no_stream(executor: Halving) -> None:
    stopped = Stopped(executor)
    work = executor.submitted("prompt", 0, executor.last)
    running = asyncio.create_task(beside(executor, work))
    await stopped.between_halves()
    (prompt,) = [each for each in executor._waiting if each.work is work]
    executor.leave(prompt.caller)
    stopped.go_on()
    while executor._waiting:  # noqa: ASYNC110 - another thread computes
        await asyncio.sleep(0.001)
    assert sum("prompt" in sessions for _, _, sessions in executor.ran) == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
