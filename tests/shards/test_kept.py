"""Shards that a node keeps in a folder: they are read from there, and damaged ones are fetched again."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from resplit.errors import ShardError
from resplit.shards import kept as kept_module
from resplit.shards.kept import DiskFullError, KeptShards
from resplit.shards.registry import Registry


@pytest.fixture
def registry() -> Registry:
    return Registry(f"memory://{uuid.uuid4().hex}")


def test_a_kept_shard_is_read_without_the_registry(registry: Registry, tmp_path: Path) -> None:
    kept, name = KeptShards(registry, tmp_path / "kept"), registry.put(b"sealed")
    assert kept.fetch(name, 6) == 6
    assert kept.fetch(name, 6) == 0
    registry.delete(name)
    assert kept.get(name, 6) == b"sealed"
    assert kept.kept_bytes == 6


def test_a_damaged_kept_shard_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    kept, name = KeptShards(registry, tmp_path), registry.put(b"sealed")
    kept.fetch(name, 6)
    (tmp_path / name).write_bytes(b"broken")
    assert kept.get(name, 6) == b"sealed"
    (tmp_path / name).write_bytes(b"short")
    assert kept.fetch(name, 6) == 6


def test_other_shards_are_forgotten(registry: Registry, tmp_path: Path) -> None:
    kept = KeptShards(registry, tmp_path)
    one, other = registry.put(b"one"), registry.put(b"other")
    kept.fetch(one, 3)
    kept.fetch(other, 5)
    kept.keep_only({other})
    assert [path.name for path in tmp_path.iterdir()] == [other]


def test_nothing_is_kept_of_a_registry_that_is_a_folder(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    kept, name = KeptShards(registry, tmp_path / "kept"), registry.put(b"sealed")
    assert kept.fetch(name, 6) == 0
    assert kept.get(name, 6) == b"sealed"
    assert not (tmp_path / "kept").exists()


def test_an_unknown_shard_is_an_error(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="package the model again"):
        KeptShards(registry, tmp_path).get("0" * 64, 3)


def test_a_shard_without_room_is_not_fetched_and_can_be_read(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, name = KeptShards(registry, tmp_path / "kept"), registry.put(b"sealed")
    monkeypatch.setattr(kept_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5))
    with pytest.raises(
        DiskFullError, match=r"kept: there is no room to keep a shard of 6 bytes, 5 bytes are free; make room"
    ):
        kept.fetch(name, 6)
    assert kept.kept_bytes == 0
    assert kept.get(name, 6) == b"sealed"
    monkeypatch.undo()
    assert kept.fetch(name, 6) == 6


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "kept").symlink_to("gone")
    kept, name = KeptShards(registry, tmp_path / "kept"), registry.put(b"sealed")
    with pytest.raises(ShardError, match=r"kept: no shard can be kept there \(File exists\); check its permissions"):
        kept.fetch(name, 6)
