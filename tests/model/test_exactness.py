"""The ONNX engine gives a row the same bits in any batch, any chunk of a prompt, any split, and after any transfer."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.model.activation import Activation, token_ids
from resplit.model.engines.base import CHUNK_TOKENS, Engine, SessionRows
from tests.model.conftest import CONFIGS, unsplit
from tests.support.engines import engine_with, run_rows
from tests.support.properties import examples

CAPACITY = 64
WIDTHS = ("float32", "int8", "int4")


@pytest.fixture(scope="module", params=WIDTHS)
def width(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral-sliding"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return unsplit(request.param)


@pytest.fixture(scope="module")
def engine(model: torch.nn.Module, width: str) -> Engine[Any]:
    return engine_with(model, engine="onnx", weights=width)


class Stream:
    """One session that decodes fixed tokens; `logits` has the answer to each of its passes."""

    def __init__(self, name: str, tokens: list[int], prompt: int) -> None:
        self.name = name
        self.steps = [tokens[:prompt], *([token] for token in tokens[prompt:])]
        self.position = 0
        self.logits: list[bytes] = []

    def rows(self) -> SessionRows:
        return SessionRows(self.name, self.position, CAPACITY, token_ids(self.steps[len(self.logits)]))

    def take(self, answer: object) -> None:
        assert isinstance(answer, Activation)
        self.position += len(self.steps[len(self.logits)])
        self.logits.append(answer.data)

    @property
    def done(self) -> bool:
        return len(self.logits) == len(self.steps)


def alone(engine: Engine[Any], stream: Stream) -> list[bytes]:
    twin = Stream(f"{stream.name} alone", [token for step in stream.steps for token in step], len(stream.steps[0]))
    while not twin.done:
        twin.take(*engine.run(0, len(engine.kinds) - 1, [twin.rows()]))
    engine.close(twin.name)
    return twin.logits


@examples(12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_streams_that_join_and_leave_get_the_bits_that_each_gets_alone(engine: Engine[Any], seed: int) -> None:
    rng = random.Random(seed)
    streams = []
    for number in range(rng.randint(2, 12)):
        tokens = [rng.randrange(97) for _ in range(rng.randint(4, 30))]
        streams.append(Stream(f"s{number}", tokens, rng.randint(1, len(tokens))))
    while waiting := [stream for stream in streams if not stream.done]:
        batch = rng.sample(waiting, rng.randint(1, len(waiting)))
        for stream, answer in zip(batch, engine.run(0, len(engine.kinds) - 1, [s.rows() for s in batch]), strict=True):
            stream.take(answer)
    for stream in streams:
        engine.close(stream.name)
        assert stream.logits == alone(engine, stream)


@examples(10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(40, 160), cuts=st.sets(st.integers(1, 9), max_size=6), steps=st.integers(0, 3))
def test_a_prompt_in_chunks_gives_the_bits_of_the_whole_prompt(
    engine: Engine[Any], length: int, cuts: set[int], steps: int
) -> None:
    tokens, last = [(7 * position) % 97 for position in range(length + steps)], len(engine.kinds) - 1

    def answers(name: str, cuts: list[int]) -> Iterator[bytes]:
        start = 0
        for end in [*cuts, *range(length, length + 1 + steps)]:
            answer = run_rows(engine, name, (0, last), start, token_ids(tokens[start:end]), 200)
            if end >= length:
                yield answer.data
            start = end
        engine.close(name)

    chunks = [CHUNK_TOKENS * cut for cut in sorted(cuts) if CHUNK_TOKENS * cut < length]
    assert list(answers("chunks", chunks)) == list(answers("whole", []))


@examples(10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.integers(1, 20), steps=st.integers(1, 12), others=st.integers(0, 3))
def test_stepwise_rows_get_the_bits_of_steps_one_by_one(
    engine: Engine[Any], prompt: int, steps: int, others: int
) -> None:
    stream = Stream("s", [(11 * position) % 97 for position in range(prompt + steps)], prompt)
    expected, last = alone(engine, stream), len(engine.kinds) - 1
    batch = [SessionRows(f"other {n}", 0, CAPACITY, token_ids([n + 1] * (n + 1))) for n in range(others)]
    run_rows(engine, "s", (0, last), 0, token_ids(stream.steps[0]))
    tokens = token_ids([step[0] for step in stream.steps[1:]])
    rows = SessionRows("s", prompt, CAPACITY, tokens, stepwise=True, drafts=steps - 1)
    *_, answer = engine.run(0, last, [*batch, rows])
    assert isinstance(answer, Activation)
    assert answer.shape == (steps, 97)
    assert answer.data == b"".join(expected[1:])
    for session in engine.sessions():
        engine.close(session)


def test_one_bad_session_stops_no_other(engine: Engine[Any]) -> None:
    last = len(engine.kinds) - 1
    good = SessionRows("good", 0, CAPACITY, token_ids([1, 2, 3]))
    bad = [
        SessionRows("gap", 5, CAPACITY, token_ids([1])),
        SessionRows("full", 0, 2, token_ids([1, 2, 3])),
        SessionRows("unknown token", 0, CAPACITY, token_ids([97])),
        SessionRows("no shape", 0, CAPACITY, Activation("int64", (), b"")),
    ]
    first, *errors, second = engine.run(0, last, [good, *bad, SessionRows("also good", 0, CAPACITY, good.values)])
    assert [type(error).__name__ for error in errors] == ["DataError", "CapacityError", "DataError", "DataError"]
    assert isinstance(first, Activation)
    assert first == second
    assert engine.sessions() == {"good", "also good"}
    for session in engine.sessions():
        engine.close(session)


@pytest.mark.parametrize("split", ["layer", "sublayer"])
def test_any_cut_gives_the_bits_of_one_segment(model: torch.nn.Module, width: str, split: str) -> None:
    engine = engine_with(model, None, split, "onnx", width)
    last = len(engine.kinds) - 1

    def answers(name: str, segments: Callable[[], list[tuple[int, int]]]) -> list[bytes]:
        found, position = [], 0
        for step in ([3, 1, 4, 1, 5, 9, 2, 6], [5], [3], [5], [8]):
            values = token_ids(step)
            for segment in segments():
                values = run_rows(engine, name, segment, position, values)
            position += len(step)
            found.append(values.data)
        return found

    expected = answers("whole", lambda: [(0, last)])
    for cut in range(1, last + 1):
        assert answers(f"cut {cut}", lambda cut=cut: [(0, cut - 1), (cut, last)]) == expected
    assert answers("blocks", lambda: [(block, block) for block in range(last + 1)]) == expected


def test_caches_move_between_engines_without_changing_a_bit(model: torch.nn.Module, width: str) -> None:
    old, new = (engine_with(model, engine="onnx", weights=width) for _ in range(2))
    blocks = 0, len(old.kinds) - 1
    run_rows(old, "s", blocks, 0, token_ids([5, 9, 2, 44, 61]))
    for block in filter(old.has_cache, range(blocks[1] + 1)):
        new.import_cache("s", block, 0, CAPACITY, old.export_cache("s", block, 0, 3))
        new.import_cache("s", block, 3, CAPACITY, old.export_cache("s", block, 3, 5))
    assert run_rows(new, "s", blocks, 5, token_ids([7])) == run_rows(old, "s", blocks, 5, token_ids([7]))


def test_every_family_but_gpt2_runs_on_this_engine() -> None:
    for family in CONFIGS:
        engine = engine_with(unsplit(family), [], engine="auto")
        assert engine.spec.engine == ("torch" if family == "gpt2" else "onnx")


def test_engines_that_are_opened_at_once_share_one_pool_of_threads() -> None:
    code = (
        "import threading\n"
        "from resplit.model.engines.onnx.runtime import Runtime\n"
        "threads = [threading.Thread(target=Runtime, args=(1,)) for _ in range(16)]\n"
        "failed = []\n"
        "threading.excepthook = lambda args: failed.append(args.exc_value)\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(failed)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
