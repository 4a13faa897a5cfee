from __future__ import annotations

import hashlib
import json
import resource
import signal
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from resplit.errors import ShardError
from resplit.shards.keyring import Keyring, KeyringEntry
from resplit.shards.registry import Registry
from resplit.shards.sealing import new_key, open_shard, seal


@pytest.fixture(params=["folder", "file://", "memory://"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    place = tmp_path / "shards"
    urls = {"folder": str(place), "file://": f"file://{place}", "memory://": f"memory://{uuid.uuid4().hex}"}
    return Registry(urls[request.param])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "state" / "keyring.json")


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Every write beyond `limit_bytes` of one file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_shard_comes_back_by_the_hash_of_its_ciphertext(registry: Registry) -> None:
    name = registry.put(b"sealed")
    assert name == hashlib.sha256(b"sealed").hexdigest()
    assert registry.get(name) == b"sealed"
    assert registry.has(name)
    assert registry.put(b"sealed") == name


def test_a_deleted_shard_is_gone_and_may_be_deleted_again(registry: Registry) -> None:
    name = registry.put(b"sealed")
    registry.delete(name)
    registry.delete(name)
    assert not registry.has(name)
    with pytest.raises(ShardError, match="package the model again"):
        registry.get(name)


def test_an_empty_registry_has_nothing(registry: Registry) -> None:
    assert not registry.has("0" * 64)
    with pytest.raises(ShardError, match="is not in"):
        registry.get("0" * 64)


def test_a_corrupt_shard_is_never_handed_out(folder: Path) -> None:
    registry = Registry(str(folder))
    name = registry.put(bytes(1000))
    content = bytearray((folder / name).read_bytes())
    content[500] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ShardError, match="corrupt"):
        registry.get(name)


def test_a_shard_cut_short_is_replaced(folder: Path) -> None:
    registry = Registry(str(folder))
    name = registry.put(b"sealed")
    (folder / name).write_bytes(b"sea")
    registry.put(b"sealed")
    assert registry.get(name) == b"sealed"


@pytest.mark.parametrize("name", ["", "../secret", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 64 + "/x"])
def test_a_name_that_is_no_hash_is_refused(registry: Registry, name: str) -> None:
    for ask in (registry.get, registry.has, registry.delete):
        with pytest.raises(ShardError, match="not the name of a shard"):
            ask(name)


def test_a_full_disk_leaves_no_half_shard(folder: Path) -> None:
    registry = Registry(str(folder))
    kept = registry.put(b"small")
    with file_size_limit(4096), pytest.raises(ShardError, match="make room"):
        registry.put(bytes(100_000))
    assert [path.name for path in folder.iterdir()] == [kept]
    assert registry.get(registry.put(bytes(100_000))) == bytes(100_000)


def test_an_unreachable_registry_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    registry = Registry(str(tmp_path / "file" / "shards"))
    for ask in (lambda: registry.put(b"sealed"), lambda: registry.get("0" * 64)):
        with pytest.raises(ShardError, match="file/shards"):
            ask()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def package(block: str, plain: bytes, registry: Registry, keyring: Keyring) -> KeyringEntry:
    """A block's shard, sealed and stored."""
    key = new_key()
    return keyring.add(block, sha256(plain), registry.put(seal(plain, key)), key)


def test_a_packaged_block_is_known_by_its_content(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    registry = Registry(str(folder))
    assert keyring.find("layer.0", sha256(b"weights")) is None
    first = package("layer.0", b"weights", registry, keyring)
    again = Keyring(tmp_path / "state" / "keyring.json")
    assert again.find("layer.0", sha256(b"weights")) == again["layer.0"] == first
    assert again.find("layer.0", sha256(b"other weights")) is None
    assert again.find("layer.1", sha256(b"weights")) is None
    assert open_shard(registry.get(first.shard), again["layer.0"].key) == b"weights"


def test_a_block_packaged_anew_has_its_new_shard(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    registry = Registry(str(folder))
    package("layer.0", b"weights", registry, keyring)
    second = package("layer.0", b"other weights", registry, keyring)
    assert Keyring(tmp_path / "state" / "keyring.json")["layer.0"] == keyring["layer.0"] == second


def test_the_same_content_in_two_blocks_is_two_shards(folder: Path, keyring: Keyring) -> None:
    registry = Registry(str(folder))
    assert len({package(block, b"tied weights", registry, keyring).shard for block in ("embed", "head")}) == 2


def test_nothing_in_the_registry_tells_model_layer_or_tensor(folder: Path, keyring: Keyring) -> None:
    registry = Registry(str(folder))
    contents = [b'{"model.layers.%d.mlp.up_proj.weight":' % layer + bytes(3000) for layer in range(4)]
    for layer, plain in enumerate(contents):
        package(f"layer.{layer}", plain, registry, keyring)
    files = list(folder.rglob("*"))
    assert len(files) == 4
    assert {len(path.name) for path in files} == {64}
    assert len({path.stat().st_size for path in files}) == 1
    told = b"".join(path.name.encode() + path.read_bytes() for path in files)
    assert not [word for word in (b"layer", b"model", b"mlp", b"proj", b"weight") if word in told]
    assert not [plain for plain in contents if sha256(plain).encode() in told]


def test_the_keyring_is_readable_by_its_owner_only(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    package("layer.0", b"weights", Registry(str(folder)), keyring)
    assert stat.S_IMODE((tmp_path / "state" / "keyring.json").stat().st_mode) == 0o600


def test_a_keyring_that_cannot_be_written_stays_as_it_was(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    registry = Registry(str(folder))
    first = package("layer.0", b"weights", registry, keyring)
    path = tmp_path / "state" / "keyring.json"
    with file_size_limit(path.stat().st_size + 10), pytest.raises(ShardError, match="cannot be written"):
        package("layer.1", b"weights", registry, keyring)
    assert list(path.parent.iterdir()) == [path]
    assert Keyring(path)["layer.0"] == keyring["layer.0"] == first
    with pytest.raises(ShardError, match=r"layer\.1"):
        keyring["layer.1"]


@pytest.mark.parametrize("content", ["", "[]", '{"layer.0": 3}', json.dumps({"layer.0": {"shard": "x", "key": "?"}})])
def test_a_broken_keyring_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "keyring.json").write_text(content)
    with pytest.raises(ShardError, match=r"keyring\.json"):
        Keyring(tmp_path / "keyring.json")


def test_a_large_shard_makes_the_round_trip(registry: Registry) -> None:
    plain, key = bytes(range(256)) * 20_000, new_key()
    assert open_shard(registry.get(registry.put(seal(plain, key))), key) == plain
