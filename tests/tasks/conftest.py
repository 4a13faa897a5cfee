"""The telemetry of a small cluster."""

from __future__ import annotations

import pytest

from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures
from tests.support.telemetry import MACHINES, block_features, telemetry_of


@pytest.fixture(scope="session")
def features() -> tuple[BlockFeatures, ...]:
    return block_features()


@pytest.fixture(scope="session")
def telemetry(features: tuple[BlockFeatures, ...]) -> Telemetry:
    return telemetry_of(MACHINES, features)
