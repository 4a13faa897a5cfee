"""The controller's keyring, together with a registry."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from resplit.errors import ShardError
from resplit.shards.keyring import Keyring, KeyringEntry
from resplit.shards.registry import Registry
from resplit.shards.sealing import new_key, open_shard, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "state" / "keyring.json")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def package(block: str, plain: bytes, registry: Registry, keyring: Keyring) -> KeyringEntry:
    """Seal and store one block."""
    key = new_key()
    sealed = seal(plain, key)
    return keyring.add(block, KeyringEntry(registry.put(sealed), len(sealed), key, sha256(plain)))


def test_a_packaged_block_is_found_by_its_content(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    registry = Registry(str(folder))
    assert keyring.find("layer.0", sha256(b"weights")) is None
    first = package("layer.0", b"weights", registry, keyring)
    again = Keyring(tmp_path / "state" / "keyring.json")
    assert again.find("layer.0", sha256(b"weights")) == again["layer.0"] == first
    assert again.find("layer.0", sha256(b"other weights")) is None
    assert again.find("layer.1", sha256(b"weights")) is None
    assert open_shard(registry.get(first.shard, first.sealed_bytes), again["layer.0"].key) == b"weights"


def test_packaging_changed_content_replaces_the_entry(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    registry = Registry(str(folder))
    package("layer.0", b"weights", registry, keyring)
    second = package("layer.0", b"other weights", registry, keyring)
    assert Keyring(tmp_path / "state" / "keyring.json")["layer.0"] == keyring["layer.0"] == second


def test_the_same_content_in_two_blocks_gives_two_shards(folder: Path, keyring: Keyring) -> None:
    registry = Registry(str(folder))
    assert len({package(block, b"tied weights", registry, keyring).shard for block in ("embed", "head")}) == 2


def test_the_registry_reveals_no_model_layer_or_tensor(folder: Path, keyring: Keyring) -> None:
    registry = Registry(str(folder))
    contents = [b'{"model.layers.%d.mlp.up_proj.weight":' % layer + bytes(3000) for layer in range(4)]
    for layer, plain in enumerate(contents):
        package(f"layer.{layer}", plain, registry, keyring)
    files = list(folder.rglob("*"))
    assert len(files) == 4
    assert {len(path.name) for path in files} == {64}
    assert len({path.stat().st_size for path in files}) == 1
    visible = b"".join(path.name.encode() + path.read_bytes() for path in files)
    assert not [word for word in (b"layer", b"model", b"mlp", b"proj", b"weight") if word in visible]
    assert not [plain for plain in contents if sha256(plain).encode() in visible]


def test_only_its_owner_can_read_the_keyring(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    package("layer.0", b"weights", Registry(str(folder)), keyring)
    assert stat.S_IMODE((tmp_path / "state" / "keyring.json").stat().st_mode) == 0o600


def test_a_keyring_that_cannot_be_written_stays_unchanged(
    folder: Path, keyring: Keyring, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    registry = Registry(str(folder))
    first = package("layer.0", b"weights", registry, keyring)
    path = tmp_path / "state" / "keyring.json"
    with full_disk(path.stat().st_size + 10), pytest.raises(ShardError, match="cannot be written"):
        package("layer.1", b"weights", registry, keyring)
    assert list(path.parent.iterdir()) == [path]
    assert Keyring(path)["layer.0"] == keyring["layer.0"] == first
    with pytest.raises(ShardError, match=r"layer\.1"):
        keyring["layer.1"]


@pytest.mark.parametrize("content", ["", "[]", '{"layer.0": 3}', json.dumps({"layer.0": {"shard": "x", "key": "?"}})])
def test_an_error_names_the_keyring_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "keyring.json").write_text(content)
    with pytest.raises(ShardError, match=r"keyring\.json"):
        Keyring(tmp_path / "keyring.json")
