"""The fit and the file of the last good model."""

from __future__ import annotations

from pathlib import Path

import pytest

from resplit.cost import CostModel
from resplit.errors import DataError
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures
from tasks.fit import fit, fit_and_keep, last_good_model
from tests.support.telemetry import MACHINES, node_rows


def test_the_fitted_model_is_kept_in_the_file(
    tmp_path: Path, telemetry: Telemetry, features: tuple[BlockFeatures, ...]
) -> None:
    path = tmp_path / "state" / "cost-model.json"
    model = fit.fn(telemetry, features, path)
    assert isinstance(model, CostModel)
    assert last_good_model(path) == model
    assert [file.name for file in path.parent.iterdir()] == ["cost-model.json"]


def test_after_insufficient_data_the_last_good_model_is_kept(
    tmp_path: Path, telemetry: Telemetry, features: tuple[BlockFeatures, ...]
) -> None:
    path = tmp_path / "cost-model.json"
    model = fit_and_keep(telemetry, features, path)
    with pytest.raises(DataError, match="block 'embed'"):
        fit_and_keep(telemetry, features[1:], path)
    assert last_good_model(path) == model


def test_insufficient_data_without_a_model_leaves_no_file(tmp_path: Path, features: tuple[BlockFeatures, ...]) -> None:
    path = tmp_path / "cost-model.json"
    with pytest.raises(DataError, match="no prefill timing"):
        fit_and_keep(Telemetry.from_rows({"nodes": node_rows(MACHINES, [0.0])}), features, path)
    with pytest.raises(DataError, match="no fitted cost model yet"):
        last_good_model(path)


def test_an_empty_window_is_filled_from_the_last_good_model(
    tmp_path: Path, telemetry: Telemetry, features: tuple[BlockFeatures, ...]
) -> None:
    path = tmp_path / "cost-model.json"
    before = fit_and_keep(telemetry, features, path)
    after = fit_and_keep(Telemetry.from_rows({"nodes": node_rows(MACHINES, [9.0])}), features, path)
    assert after.links == before.links
    assert after.fitted_at_s == 9.0


def test_a_file_that_is_not_a_model_is_named_and_replaced_by_the_next_fit(
    tmp_path: Path, telemetry: Telemetry, features: tuple[BlockFeatures, ...]
) -> None:
    path = tmp_path / "cost-model.json"
    path.write_text("[]")
    with pytest.raises(DataError, match=r"cost-model\.json: not a cost model"):
        last_good_model(path)
    assert fit_and_keep(telemetry, features, path) == last_good_model(path)
