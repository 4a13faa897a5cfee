"""The rules for a placement, and the words in which a violation is reported."""

from __future__ import annotations

import pytest

from resplit.control.rules import PlacementRules
from resplit.model.source import StoredModel
from tests.support.three_nodes import SPREAD, A, B, C, three_node_config


@pytest.fixture
def rules(stored_model: StoredModel) -> PlacementRules:
    return PlacementRules.of(three_node_config(), stored_model)


def test_a_legal_placement_violates_no_rule(rules: PlacementRules) -> None:
    assert rules.violation(SPREAD) is None
    assert rules.privacy_violation(SPREAD) is None


def test_the_private_blocks_are_both_ends_and_the_first_layers(stored_model: StoredModel) -> None:
    assert PlacementRules.of(three_node_config(), stored_model).private == {0, 1, 7}
    assert PlacementRules.of(three_node_config(private_layers=3), stored_model).private == {0, 1, 2, 3, 7}


@pytest.mark.parametrize("placement", [[], SPREAD[:-1], [*SPREAD, A]])
def test_every_block_must_be_placed_once(rules: PlacementRules, placement: list[str]) -> None:
    assert rules.violation(placement) == f"{len(placement)} blocks placed, the model has 8"


def test_an_unknown_node_is_named_with_the_block(rules: PlacementRules) -> None:
    assert rules.violation([*SPREAD[:3], "delta", *SPREAD[4:]]) == "block layer.2: no node is called 'delta'"


def test_a_drained_node_may_run_no_block(stored_model: StoredModel) -> None:
    rules = PlacementRules.of(three_node_config(), stored_model, frozenset({C}))
    assert rules.violation(SPREAD) == "block layer.3: gamma is drained; `resplit join gamma` lets it serve again"
    assert rules.violation([A, A, B, B, B, B, B, A]) is None


@pytest.mark.parametrize(("block", "name"), [(0, "embed"), (1, "layer.0"), (7, "head")])
def test_a_private_block_must_be_on_a_trusted_node(rules: PlacementRules, block: int, name: str) -> None:
    placement = [A if at != block else C for at in range(8)]
    assert rules.violation(placement) == f"block {name} is private and gamma is not trusted"
    assert rules.privacy_violation(placement) == rules.violation(placement)


def test_the_first_exposed_block_is_the_one_that_is_named(rules: PlacementRules) -> None:
    assert rules.privacy_violation([A, C, B, B, B, B, B, C]) == "block layer.0 is private and gamma is not trusted"
