"""The registry over local folders and other file systems."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from resplit.errors import ShardError
from resplit.shards.registry import Registry
from resplit.shards.sealing import new_key, open_shard, seal

FullDisk = Callable[[int], AbstractContextManager[None]]


@pytest.fixture(params=["folder", "file://", "memory://"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    place = tmp_path / "shards"
    urls = {"folder": str(place), "file://": f"file://{place}", "memory://": f"memory://{uuid.uuid4().hex}"}
    return Registry(urls[request.param])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def test_a_shard_is_stored_under_the_hash_of_its_ciphertext(registry: Registry) -> None:
    name = registry.put(b"sealed")
    assert name == hashlib.sha256(b"sealed").hexdigest()
    assert registry.get(name) == b"sealed"
    assert registry.has(name)
    assert registry.put(b"sealed") == name


def test_a_deleted_shard_is_gone_and_can_be_deleted_again(registry: Registry) -> None:
    name = registry.put(b"sealed")
    registry.delete(name)
    registry.delete(name)
    assert not registry.has(name)
    with pytest.raises(ShardError, match="package the model again"):
        registry.get(name)


def test_an_empty_registry_has_no_shards(registry: Registry) -> None:
    assert not registry.has("0" * 64)
    with pytest.raises(ShardError, match="is not in"):
        registry.get("0" * 64)


def test_a_corrupt_shard_is_not_returned(folder: Path) -> None:
    registry = Registry(str(folder))
    name = registry.put(bytes(1000))
    content = bytearray((folder / name).read_bytes())
    content[500] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ShardError, match="corrupt"):
        registry.get(name)


def test_a_truncated_shard_is_replaced_by_the_next_put(folder: Path) -> None:
    registry = Registry(str(folder))
    name = registry.put(b"sealed")
    (folder / name).write_bytes(b"sea")
    registry.put(b"sealed")
    assert registry.get(name) == b"sealed"


@pytest.mark.parametrize("name", ["", "../secret", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 64 + "/x"])
def test_a_name_that_is_not_a_hash_is_refused(registry: Registry, name: str) -> None:
    for method in (registry.get, registry.has, registry.delete):
        with pytest.raises(ShardError, match="not the name of a shard"):
            method(name)


def test_a_full_disk_leaves_no_partial_shard(folder: Path, full_disk: FullDisk) -> None:
    registry = Registry(str(folder))
    kept = registry.put(b"small")
    with full_disk(4096), pytest.raises(ShardError, match="make room"):
        registry.put(bytes(100_000))
    assert [path.name for path in folder.iterdir()] == [kept]
    assert registry.get(registry.put(bytes(100_000))) == bytes(100_000)


def test_an_error_names_the_registry_that_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    registry = Registry(str(tmp_path / "file" / "shards"))
    for call in (lambda: registry.put(b"sealed"), lambda: registry.get("0" * 64)):
        with pytest.raises(ShardError, match="file/shards"):
            call()


def test_a_large_shard_is_stored_and_read_back(registry: Registry) -> None:
    plain, key = bytes(range(256)) * 20_000, new_key()
    assert open_shard(registry.get(registry.put(seal(plain, key))), key) == plain
