"""The torch engine: transferred and truncated caches give the same bits; impossible steps are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.errors import CapacityError, DataError
from resplit.model.engine import Activation, token_ids
from resplit.types import Sampling
from tests.support.engines import engine_with
from tests.support.properties import examples

TOKENS = [5, 9, 2, 44, 61, 7, 30, 12]


def last_logits(engine, session, start, tokens) -> bytes:
    return engine.run(session, 0, len(engine.kinds) - 1, start, 32, token_ids(tokens)).data


def test_a_pass_on_a_transferred_cache_gives_the_same_bits(family_model: torch.nn.Module) -> None:
    old, new = engine_with(family_model), engine_with(family_model)
    last_logits(old, "s", 0, TOKENS)
    for block, entry in enumerate(old.features):
        if entry.kv_bytes_per_token:
            new.import_cache("s", block, 0, 32, old.export_cache("s", block, 0, 5))  # pre-copied
            new.import_cache("s", block, 5, 32, old.export_cache("s", block, 5, 8))  # patched
    assert last_logits(new, "s", 8, [3]) == last_logits(old, "s", 8, [3])


def test_a_repeated_step_gives_the_same_bits(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    last_logits(engine, "s", 0, TOKENS)
    first = last_logits(engine, "s", 8, [3])
    last_logits(engine, "s", 9, [4])
    assert last_logits(engine, "s", 8, [3]) == first


def test_a_step_beyond_the_cached_positions_is_refused(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    last_logits(engine, "s", 0, TOKENS)
    with pytest.raises(DataError, match="8 positions"):
        last_logits(engine, "s", 9, [3])


def test_a_part_of_a_cache_that_would_leave_a_gap_is_refused(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    last_logits(engine, "s", 0, TOKENS)
    with pytest.raises(DataError, match="begins at 4"):
        engine.import_cache("other", 1, 4, 32, engine.export_cache("s", 1, 4, 8))


def test_a_late_part_of_a_cache_is_ignored(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    last_logits(engine, "s", 0, TOKENS)
    engine.import_cache("s", 1, 2, 32, engine.export_cache("s", 1, 2, 5))
    assert engine.lengths("s")[1] == len(TOKENS)


def test_a_session_cannot_exceed_its_capacity(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    with pytest.raises(CapacityError, match="room for 4"):
        engine.run("s", 0, 1, 0, 4, token_ids(TOKENS))


def test_closing_a_session_frees_its_caches(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    before = engine.held_bytes
    last_logits(engine, "s", 0, TOKENS)
    engine.close("s")
    assert (engine.held_bytes, engine.sessions()) == (before, set())


def test_draws_depend_on_seed_and_position_alone(family_model: torch.nn.Module) -> None:
    engine = engine_with(family_model)
    logits = engine.run("s", 0, len(engine.kinds) - 1, 0, 32, token_ids(TOKENS))
    draw = [engine.sample(logits, Sampling(1.5, 0.9, seed), position) for seed in range(8) for position in range(8)]
    again = [engine.sample(logits, Sampling(1.5, 0.9, seed), position) for seed in range(8) for position in range(8)]
    assert draw == again
    assert len(set(draw)) > 1


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["float32", "int64", "bfloat16", "complex64", ""]),
    shape=st.lists(st.integers(-1, 40), max_size=4).map(tuple),
    data=st.binary(max_size=300),
    first=st.integers(0, 6),
)
def test_any_activation_is_computed_or_refused(family_model, dtype, shape, data, first) -> None:
    engine = engine_with(family_model)
    try:
        engine.run("s", first, first, 0, 64, Activation(dtype, shape, data))
    except (DataError, CapacityError):
        assert engine.sessions() <= {"s"}
