"""Fixtures that tests of several parts share. Imports are local: most tests need neither torch nor a cluster."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from resplit.process.garbage import freeze_startup_objects
from tests.support.alone import machine

if TYPE_CHECKING:
    import torch

    from resplit.cluster.local import Cluster
    from resplit.model.source import StoredModel
    from tests.support.shared_cluster import SharedCluster

# A slow machine makes no property fail, and a change fails only for what it changed: examples are the same at each run.
# RESPLIT_RANDOM_TESTS=1 (`make test-random`) looks for new ones.
settings.register_profile("any machine", deadline=None, derandomize=os.environ.get("RESPLIT_RANDOM_TESTS") != "1")
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random six-layer Llama and its tokenizer, saved as a local folder."""
    from tests.support.cluster import make_model

    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def unsplit_model(model_folder: Path) -> torch.nn.Module:
    """The same model in one piece. Its tokens are what a cluster must return."""
    from tests.support.cluster import load_unsplit

    return load_unsplit(model_folder)


@pytest.fixture(scope="session")
def stored_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    """The same model in one file per block: embed, six layers and head make eight blocks."""
    import torch

    from resplit.model.source import obtain

    torch.set_num_threads(1)
    return obtain(str(model_folder), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def shared_cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedCluster]:
    """The cluster behind `cluster`. Starting one takes many seconds."""
    from tests.support.shared_cluster import SharedCluster

    shared = SharedCluster(tmp_path_factory.mktemp("cluster"), model_folder)
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def cluster(shared_cluster: SharedCluster) -> Cluster:
    """Four node processes, and one for gateway and controller, with a plan deployed. Earlier modules have used it."""
    return shared_cluster.restored()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the tests without garbage collections, then exempt the modules from them: they are never freed."""
    gc.disable()
    try:
        return (yield)
    finally:
        freeze_startup_objects()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the shared cluster last: while it runs, it takes a part of the processor.

    The others begin in the order of their files (`--no-loadscope-reorder`). By default files with few tests would begin
    last, and those are among the longest.
    """
    items.sort(key=lambda item: "shared_cluster" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test marked `alone` while no other process of this pytest runs a test."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with machine(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """A context manager in which every write beyond a number of bytes of one file fails."""
    from tests.support.full_disk import full_disk

    return full_disk
