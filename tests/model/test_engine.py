"""Every engine: transferred and truncated caches give the same bits; impossible steps are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.errors import CapacityError, DataError
from resplit.model.activation import Activation, token_ids
from resplit.model.engines.base import Engine
from resplit.model.sampling import sample
from resplit.types import Sampling
from tests.support.engines import run_rows
from tests.support.properties import examples

NewEngine = Callable[..., Engine[Any]]
TOKENS = [5, 9, 2, 44, 61, 7, 30, 12]


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
def test_any_activation_is_computed_or_refused(new_engine, dtype, shape, data, first) -> None:
    engine = new_engine()
    try:
        run_rows(engine, "s", (first, first), 0, Activation(dtype, shape, data))
    except (DataError, CapacityError):
        assert engine.sessions() <= {"s"}
