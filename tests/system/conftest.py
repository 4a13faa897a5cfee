"""A tiny real model and a cluster of real node processes, without emulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resplit.cluster.local import Cluster
from tests.support.cluster import make_model, started, whole_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random six-layer Llama and its tokenizer, as a local folder."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def whole(model_folder: Path) -> torch.nn.Module:
    """The unsplit model, the oracle."""
    return whole_model(model_folder)


@pytest.fixture(scope="module")
def cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four node processes, gateway and controller, with a first plan deployed."""
    with started(tmp_path_factory.mktemp("cluster"), model_folder) as running:
        yield running
