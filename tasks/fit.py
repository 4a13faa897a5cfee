"""Fit: the cost model from telemetry, with the last good model kept in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cost import CostModel, SpeedJump, fit_cost_model
from resplit.errors import DataError
from resplit.files import write_atomically
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures

__all__ = ["fit", "fit_and_keep", "last_good_model"]

_log = structlog.get_logger(__name__)


def last_good_model(path: Path) -> CostModel:
    """Read the model that the last successful fit kept at `path`; DataError if there is no cost model."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: there is no fitted cost model yet ({error.strerror})") from error
    try:
        return CostModel.from_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def fit_and_keep(
    telemetry: Telemetry,
    features: Sequence[BlockFeatures],
    path: Path,
    hold_out: bool = True,
    jumps: Mapping[str, SpeedJump] | None = None,
) -> CostModel:
    """Fit the window `telemetry`, with the model at `path` as the guess if there is one, and replace that file.

    `features` must be those of the model at `path`, and `jumps` count from it (see `fit_cost_model`). DataError if the
    telemetry is not sufficient; the file then stays unchanged. A file that cannot be read is ignored and replaced.
    """
    model = fit_cost_model(telemetry, features, _previous(path), hold_out=hold_out, jumps=jumps or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, model.to_json())
    _log.info(
        "cost model fitted",
        nodes=len(model.reference_s),
        links=len(model.links),
        held_out_contexts=model.held_out_contexts.median,
        held_out_nodes=model.held_out_nodes.median,
    )
    return model


def _previous(path: Path) -> CostModel | None:
    if not path.exists():
        return None
    try:
        return last_good_model(path)
    except DataError as error:
        _log.warning("the previous cost model is ignored", reason=str(error))
        return None


fit = task(name="fit", cache_policy=NO_CACHE)(fit_and_keep)
