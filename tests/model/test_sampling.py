"""Tokens are chosen among those that sampling and changes leave, and log probabilities are those of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import DataError
from resplit.model.activation import of_array
from resplit.model.sampling import logprobs, sample
from resplit.types import LogitChange, Sampling
from resplit.wire.choices import changes_from_wire, changes_to_wire, logprobs_from_wire, logprobs_to_wire

VOCABULARY = 21
LOGITS = np.random.default_rng(3).normal(size=(4, VOCABULARY)).astype(np.float32)
ORDERS = np.argsort(-LOGITS, axis=1)


def drawn(sampling: dict[str, float], seeds: int = 200) -> set[int]:
    """The tokens that are drawn at the first position."""
    one = of_array(LOGITS[:1])
    return {sample(one, Sampling(**{"temperature": 1.5, **sampling, "seed": seed}), 7)[0] for seed in range(seeds)}


@pytest.mark.parametrize("most", [1, 2, 5])
def test_top_k_draws_from_the_most_likely_tokens(most: int) -> None:
    assert drawn({"top_k": most}) == set(ORDERS[0][:most].tolist())


def test_min_p_leaves_out_tokens_that_are_much_less_likely_than_the_first() -> None:
    least = 0.4
    scaled = np.exp(LOGITS[0] / 1.5)
    assert drawn({"min_p": least}) == set(np.flatnonzero(scaled >= least * scaled.max()).tolist())
    assert drawn({"min_p": 1.0}) == {int(ORDERS[0][0])}


def test_neutral_settings_change_no_draw() -> None:
    logits = of_array(LOGITS)
    for seed in range(50):
        plain = sample(logits, Sampling(1.2, 0.9, seed), 3)
        assert sample(logits, Sampling(1.2, 0.9, seed, top_k=VOCABULARY, min_p=1e-9), 3) == plain
        assert sample(logits, Sampling(1.2, 0.9, seed), 3, [LogitChange()] * 4) == plain


def drawn_from_all(values: np.ndarray, sampling: Sampling, position: int) -> int:
    """The draw as it is defined: all tokens in order of their probability, ties in order of their ids."""
    probabilities = np.exp((values - values.max()).astype(np.float64) / sampling.temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    ordered, cumulative = probabilities[order], probabilities[order].cumsum()
    counts = [int((cumulative < sampling.top_p).sum()) + 1, sampling.top_k or len(order)]
    counts += [int((ordered >= sampling.min_p * ordered[0]).sum())]
    kept = cumulative[: min(counts)]
    share = np.random.Generator(np.random.Philox(key=[sampling.seed, position])).random()
    return int(order[min(int(np.searchsorted(kept, share * kept[-1], side="right")), len(kept) - 1)])


@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.1, 2.0, 6.0]),
    digits=st.sampled_from([0, 6]),
    top_p=st.sampled_from([0.5, 0.95, 0.999999, 1.0]),
    top_k=st.sampled_from([0, 40, 900]),
    min_p=st.sampled_from([0.0, 1e-7, 0.05]),
)
def test_few_tokens_are_sorted_and_the_draw_is_that_from_all(
    seed: int, spread: float, digits: int, top_p: float, top_k: int, min_p: float
) -> None:
    values = np.random.default_rng(seed).normal(scale=spread, size=1000).round(digits).astype(np.float32)
    sampling = Sampling(0.8, top_p, seed, top_k, min_p)
    assert sample(of_array(values[None]), sampling, 7) == (drawn_from_all(values, sampling, 7),)


def bits(tokens: set[int]) -> bytes:
    return np.packbits([token in tokens for token in range(VOCABULARY)], bitorder="little").tobytes()


@given(
    st.lists(st.sets(st.integers(0, VOCABULARY - 1), min_size=1), min_size=4, max_size=4),
    st.sampled_from([Sampling(), Sampling(2.0, 1.0, 9)]),
)
def test_only_allowed_tokens_are_chosen_at_each_position(allowed: list[set[int]], sampling: Sampling) -> None:
    changes = changes_from_wire(changes_to_wire([LogitChange(bits(tokens)) for tokens in allowed]))
    for token, tokens in zip(sample(of_array(LOGITS), sampling, 0, changes), allowed, strict=True):
        assert token in tokens


def test_added_values_change_the_choice() -> None:
    first, second = ORDERS[0][:2]
    lead = float(LOGITS[0][first] - LOGITS[0][second])
    for added, chosen in ((0.9 * lead, first), (1.1 * lead, second)):
        (change,) = changes_from_wire(changes_to_wire([LogitChange(added={int(second): added})]))
        assert sample(of_array(LOGITS[:1]), Sampling(), 0, [change]) == (chosen,)


@pytest.mark.parametrize(
    "changes",
    [
        [LogitChange()] * 2,
        [LogitChange(b"\xff" * 4)],
        [LogitChange(added={VOCABULARY: 1.0})],
        [LogitChange(bytes(3))],
        [LogitChange(added={0: float("nan")})],
    ],
)
def test_a_change_that_does_not_fit_is_refused(changes: list[LogitChange]) -> None:
    with pytest.raises(DataError):
        sample(of_array(LOGITS[:1]), Sampling(), 0, changes)


def test_bits_that_cannot_be_read_are_refused_and_large_ones_cut() -> None:
    (message,) = changes_to_wire([LogitChange(bytes(10**7))])
    assert len(changes_from_wire([message])[0].allowed) < 10**6
    message.allowed = b"no zlib"
    with pytest.raises(DataError, match="cannot be read"):
        changes_from_wire([message])


def test_log_probabilities_are_those_of_the_model() -> None:
    expected = torch.tensor(LOGITS).log_softmax(-1)
    tokens = [0, 5, 20, 7]
    found = logprobs_from_wire(logprobs_to_wire(logprobs(of_array(LOGITS), tokens, 3)))
    for place, each in enumerate(found):
        assert each.chosen == pytest.approx(float(expected[place, tokens[place]]), abs=1e-6)
        assert [token for token, _ in each.top] == ORDERS[place][:3].tolist()
        assert [value for _, value in each.top] == pytest.approx(expected[place, ORDERS[place][:3]].tolist(), abs=1e-6)
    with pytest.raises(DataError, match="do not fit"):
        logprobs(of_array(LOGITS), [1], 0)


@given(
    st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 1.0, 2.5]), min_size=VOCABULARY, max_size=VOCABULARY),
    st.integers(0, 30),
)
def test_the_most_likely_tokens_are_in_order_and_ties_in_that_of_their_ids(values: list[float], most: int) -> None:
    values[3] = 1.0  # else all may be impossible
    (found,) = logprobs(of_array(np.array([values], np.float32)), [0], most)
    assert [token for token, _ in found.top] == np.argsort(-np.array(values), kind="stable")[:most].tolist()
