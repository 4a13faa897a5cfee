"""Every engine: transferred and truncated caches give the same bits; impossible steps are refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.errors import CapacityError, DataError
from resplit.model.activation import Activation, token_ids
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.sampling import sample
from resplit.types import Sampling
from tests.support.engines import run_rows
from tests.support.properties import examples

NewEngine = Callable[..., Engine[Any]]
TOKENS = [5, 9, 2, 44, 61, 7, 30, 12]


@pytest.fixture
def engine(new_engine: NewEngine) -> Engine[Any]:
    """One engine for all random examples of a test. What an example leaves in it must harm no later one."""
    return new_engine()


def last_logits(engine, session, start, tokens) -> bytes:
    return run_rows(engine, session, (0, len(engine.kinds) - 1), start, token_ids(tokens), 32).data


def test_a_pass_on_a_transferred_cache_gives_the_same_bits(new_engine: NewEngine) -> None:
    old, new = new_engine(), new_engine()
    last_logits(old, "s", 0, TOKENS)
    for block, entry in enumerate(old.features):
        if entry.kv_bytes_per_token:
            new.import_cache("s", block, 0, 32, old.export_cache("s", block, 0, 5))  # pre-copied
            new.import_cache("s", block, 5, 32, old.export_cache("s", block, 5, 8))  # patched
    assert last_logits(new, "s", 8, [3]) == last_logits(old, "s", 8, [3])


def test_a_repeated_step_gives_the_same_bits(new_engine: NewEngine) -> None:
    engine = new_engine()
    last_logits(engine, "s", 0, TOKENS)
    first = last_logits(engine, "s", 8, [3])
    last_logits(engine, "s", 9, [4])
    assert last_logits(engine, "s", 8, [3]) == first


def stepwise(engine: Engine[Any], session: str, start: int, tokens: list[int], drafts: int = 0) -> bytes:
    """The logits of one stepwise pass over the whole chain."""
    rows = SessionRows(session, start, 32, token_ids(tokens), True, drafts)
    (answer,) = engine.run(0, len(engine.kinds) - 1, [rows])
    assert isinstance(answer, Activation)
    return answer.data


def test_a_stepwise_pass_repeats_steps_bit_for_bit(new_engine: NewEngine) -> None:
    engine = new_engine()
    for session in ("steps", "repeated"):
        last_logits(engine, session, 0, TOKENS)
    answers = [last_logits(engine, "steps", 8 + number, [token]) for number, token in enumerate(TOKENS)]
    assert stepwise(engine, "repeated", 8, TOKENS) == answers[-1]
    for block in filter(engine.has_cache, range(len(engine.kinds))):
        caches = [engine.export_cache(session, block, 0, 16) for session in ("steps", "repeated")]
        assert caches[0] == caches[1]


@examples(10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(known=st.lists(st.integers(0, 96), min_size=1, max_size=8), right=st.integers(0, 8), wrong=st.integers(0, 4))
def test_drafts_get_the_bits_of_steps_and_wrong_ones_leave_no_trace(
    engine: Engine[Any], known: list[int], right: int, wrong: int
) -> None:
    for session in ("steps", "drafts"):
        last_logits(engine, session, 0, TOKENS)
    answers = [last_logits(engine, "steps", 8 + number, [token]) for number, token in enumerate([*known, 3])]
    right = min(right, len(known) - 1)
    guesses = [*known[1 : right + 1], *[96] * wrong]
    found = stepwise(engine, "drafts", 8, [known[0], *guesses], len(guesses))
    assert found[: len(b"".join(answers[: right + 1]))] == b"".join(answers[: right + 1])
    assert set(engine.lengths("drafts").values()) <= {0, 9}
    for number in range(right + 1, len(known) + 1):
        assert last_logits(engine, "drafts", 8 + number, [[*known, 3][number]]) == answers[number]


def test_sessions_whose_drafts_differ_in_number_get_their_own_bits_in_every_pass(new_engine: NewEngine) -> None:
    engine, sessions = new_engine(), ("one", "other")
    for session, prompt in zip(sessions, (TOKENS, TOKENS[::-1]), strict=True):
        last_logits(engine, session, 0, prompt)
        last_logits(engine, f"{session} alone", 0, prompt)
    for lengths in ((2, 3), (3, 2), (2, 3)):  # the same rows in all, divided in another way
        steps = [[3, 4, 5][:length] for length in lengths]
        batch = [
            SessionRows(session, 8, 32, token_ids(step), True, len(step) - 1)
            for session, step in zip(sessions, steps, strict=True)
        ]
        answers = engine.run(0, len(engine.kinds) - 1, batch)
        alone = [
            stepwise(engine, f"{s} alone", 8, step, len(step) - 1) for s, step in zip(sessions, steps, strict=True)
        ]
        assert [answer.data for answer in answers if isinstance(answer, Activation)] == alone


def test_a_transferred_cache_replaces_drafts(new_engine: NewEngine) -> None:
    engine, other = new_engine(), new_engine()
    last_logits(engine, "s", 0, TOKENS)
    last_logits(other, "s", 0, TOKENS)
    stepwise(engine, "s", 8, [3, 96, 96, 96], 3)
    expected = [last_logits(other, "s", 8 + number, [token]) for number, token in enumerate([3, 4, 5])][-1]
    for block in filter(engine.has_cache, range(len(engine.kinds))):
        assert engine.lengths("s")[block] == 9
        with pytest.raises(DataError, match="begins at 10"):
            engine.import_cache("s", block, 10, 32, other.export_cache("s", block, 10, 11))
        engine.import_cache("s", block, 9, 32, other.export_cache("s", block, 9, 10))
        engine.import_cache("s", block, 0, 32, other.export_cache("s", block, 0, 10))
    assert last_logits(engine, "s", 10, [5]) == expected


@pytest.mark.parametrize(
    ("tokens", "drafts", "is_stepwise"), [(3, 3, True), (3, -1, True), (3, 1, False), (90, 64, True)]
)
def test_drafts_that_follow_no_position_are_refused(
    new_engine: NewEngine, tokens: int, drafts: int, is_stepwise: bool
) -> None:
    engine = new_engine()
    (answer,) = engine.run(0, 1, [SessionRows("s", 0, 99, token_ids([1] * tokens), is_stepwise, drafts)])
    assert isinstance(answer, DataError)
    assert f"{drafts} of {tokens} positions are drafts" in str(answer)


def test_a_step_beyond_the_cached_positions_is_refused(new_engine: NewEngine) -> None:
    engine = new_engine()
    last_logits(engine, "s", 0, TOKENS)
    with pytest.raises(DataError, match="8 positions"):
        last_logits(engine, "s", 9, [3])


def test_a_part_of_a_cache_that_would_leave_a_gap_is_refused(new_engine: NewEngine) -> None:
    engine = new_engine()
    last_logits(engine, "s", 0, TOKENS)
    with pytest.raises(DataError, match="begins at 4"):
        engine.import_cache("other", 1, 4, 32, engine.export_cache("s", 1, 4, 8))


def test_a_late_part_of_a_cache_is_ignored(new_engine: NewEngine) -> None:
    engine = new_engine()
    last_logits(engine, "s", 0, TOKENS)
    engine.import_cache("s", 1, 2, 32, engine.export_cache("s", 1, 2, 5))
    assert engine.lengths("s")[1] == len(TOKENS)


def test_a_session_cannot_exceed_its_capacity(new_engine: NewEngine) -> None:
    engine = new_engine()
    with pytest.raises(CapacityError, match="room for 4"):
        run_rows(engine, "s", (0, 1), 0, token_ids(TOKENS), 4)


def test_closing_a_session_frees_its_caches(new_engine: NewEngine) -> None:
    engine = new_engine()
    before = engine.held_bytes
    last_logits(engine, "s", 0, TOKENS)
    engine.close("s")
    assert (engine.held_bytes, engine.sessions()) == (before, set())


def test_unloading_a_block_frees_its_weights_though_passes_ran_on_it(new_engine: NewEngine) -> None:
    engine = new_engine()
    for start, token in enumerate(TOKENS):
        last_logits(engine, "s", start, [token])
    weights = weakref.ref(engine._blocks[1])
    engine.unload(1)
    gc.collect()
    assert weights() is None


def test_draws_depend_on_seed_and_position_alone(new_engine: NewEngine) -> None:
    engine = new_engine()
    logits = run_rows(engine, "s", (0, len(engine.kinds) - 1), 0, token_ids(TOKENS), 32)
    draw = [sample(logits, Sampling(1.5, 0.9, seed), position) for seed in range(8) for position in range(8)]
    again = [sample(logits, Sampling(1.5, 0.9, seed), position) for seed in range(8) for position in range(8)]
    assert draw == again
    assert len(set(draw)) > 1


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["float32", "int64", "bfloat16", "complex64", ""]),
    shape=st.lists(st.integers(-1, 40), max_size=4).map(tuple),
    data=st.binary(max_size=300),
    first=st.integers(0, 6),
)
def test_any_activation_is_computed_or_refused(engine, dtype, shape, data, first) -> None:
    try:
        run_rows(engine, "s", (first, first), 0, Activation(dtype, shape, data))
    except (DataError, CapacityError):
        assert engine.sessions() <= {"s"}
