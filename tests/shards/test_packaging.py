"""Packaging a model into a registry."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from resplit.shards.sealing import open_shard


@dataclass
class Model:
    """The part of a stored model that packaging reads."""

    contents: dict[str, bytes]
    name: str = "model"

    @property
    def spec(self) -> SimpleNamespace:
        return SimpleNamespace(blocks=[SimpleNamespace(name=name) for name in self.contents])

    def content(self, block: str) -> bytes:
        return self.contents[block]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"))


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keyring.json")


def test_every_block_is_sealed_once(registry: Registry, keyring: Keyring) -> None:
    model = Model({"embed": b"tied", "layer.0": b"weights", "head": b"tied"})
    assert package(model, registry, keyring) == 3
    assert package(model, registry, keyring) == 0
    for block, plain in model.contents.items():
        entry = keyring[block]
        assert open_shard(registry.get(entry.shard, entry.sealed_bytes), entry.key) == plain


def test_only_changed_and_lost_blocks_are_sealed_again(registry: Registry, keyring: Keyring) -> None:
    package(Model({"embed": b"a", "layer.0": b"b", "head": b"c"}), registry, keyring)
    embed, head = keyring["embed"], keyring["head"]
    registry.delete(head.shard)
    assert package(Model({"embed": b"a", "layer.0": b"changed", "head": b"c"}), registry, keyring) == 2
    assert keyring["embed"] == embed
    assert keyring["head"].key != head.key, "a key seals one shard only"


def test_what_a_killed_packaging_left_half_written_is_deleted_later(
    registry: Registry, keyring: Keyring, tmp_path: Path
) -> None:
    folder, model = tmp_path / "registry", Model({"embed": b"a"})
    package(model, registry, keyring)
    left, written_now = folder / f".{'0' * 32}.new", folder / f".{'1' * 32}.new"
    for part in (left, written_now):
        part.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    package(model, registry, keyring)
    assert sorted(folder.iterdir()) == sorted([written_now, folder / keyring["embed"].shard])
