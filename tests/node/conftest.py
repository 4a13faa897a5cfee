"""A tiny random model, packaged as per-block files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resplit.model.source import StoredModel, obtain
from tests.system.conftest import model_folder

__all__ = ["model_folder"]


@pytest.fixture(scope="session")
def tiny(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    """Six layers between embed and head: eight blocks."""
    torch.set_num_threads(1)
    return obtain(str(model_folder), tmp_path_factory.mktemp("models"))
