"""The design matrix of a block pass."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resplit.cost.features import COLUMNS, design
from resplit.types import BlockFeatures


@given(tokens=st.integers(1, 200), context=st.integers(0, 200))
def test_a_prefill_does_the_same_operations_as_its_tokens_one_by_one(tokens: int, context: int) -> None:
    layer = BlockFeatures("layer.0", "layer", 1, 10.0, 3.0, 100.0, 1.0, 1.0, False, 0.0)
    at_once = design(layer, tokens, context)[0]
    one_by_one = design(layer, np.ones(tokens), context + np.arange(tokens)).sum(axis=0)
    for column in ("tokens", "flops"):
        assert at_once[COLUMNS.index(column)] == one_by_one[COLUMNS.index(column)]


def test_a_decode_step_reads_the_whole_cache(features: tuple[BlockFeatures, ...]) -> None:
    layer = features[1]
    assert design(layer, 1, [9, 99])[:, COLUMNS.index("cache_bytes")].tolist() == [10 * 3072.0, 100 * 3072.0]


def test_a_pass_reads_its_weights_once_and_the_embedding_reads_the_rows_of_its_tokens(
    features: tuple[BlockFeatures, ...],
) -> None:
    embed, layer, *_, head = features
    read = COLUMNS.index("weight_bytes")
    assert design(layer, [1, 50], 0)[:, read].tolist() == [layer.weight_bytes] * 2
    assert design(embed, [1, 50], 0)[:, read].tolist() == [2304.0, 50 * 2304.0]
    assert design(head, [1, 50], 0)[:, COLUMNS.index("flops")].tolist() == [head.flops_per_token] * 2


def test_the_work_of_a_pass_is_exactly_that_of_its_new_and_cached_tokens() -> None:
    layer = BlockFeatures("layer.0", "layer", 1, 10.0, 3.0, 100.0, 2.0, 7.0, False, 0.0)
    attended = 2 * 5 + 3  # two new tokens attend to five cached ones, to themselves, and one to the other
    assert design(layer, 2, 5).tolist() == [[1.0, 2.0, 2 * 10.0 + attended * 3.0, 100.0, 7 * 2.0]]
    embed = BlockFeatures("embed", "embed", 1, 10.0, 3.0, 100.0, 2.0, 7.0, False, 0.0)
    assert design(embed, [2, 4], 0)[:, COLUMNS.index("weight_bytes")].tolist() == [14.0, 28.0]
    head = BlockFeatures("head", "head", 1, 10.0, 0.0, 100.0, 0.0, 7.0, False, 0.0)
    assert design(head, 4, 0).tolist() == [[1.0, 4.0, 10.0, 100.0, 0.0]]
    assert design(layer, [1, 2], [5, 6]).shape == (2, 5)
