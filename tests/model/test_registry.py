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
from resplit.model.registry import Keyring, Registry
from resplit.model.shards import new_key, open_shard, seal


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


def test_packaging_the_same_model_again_writes_nothing(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    registry = Registry(str(folder))
    first = keyring.package("layer.0", b"weights", registry)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert Keyring(tmp_path / "state" / "keyring.json").package("layer.0", b"weights", registry) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written


def test_changed_or_lost_content_is_packaged_afresh(folder: Path, keyring: Keyring) -> None:
    registry = Registry(str(folder))
    first = keyring.package("layer.0", b"weights", registry)
    second = keyring.package("layer.0", b"other weights", registry)
    assert len({first.shard, second.shard}) == len({first.key, second.key}) == 2
    registry.delete(second.shard)
    third = keyring.package("layer.0", b"other weights", registry)
    assert third.key != second.key
    assert open_shard(registry.get(third.shard), third.key) == b"other weights"


def test_the_same_content_in_two_blocks_is_two_shards(folder: Path, keyring: Keyring) -> None:
    registry = Registry(str(folder))
    shards = {keyring.package(block, b"tied weights", registry).shard for block in ("embed", "head")}
    assert len(shards) == 2


def test_nothing_in_the_registry_tells_model_layer_or_tensor(folder: Path, keyring: Keyring) -> None:
    registry = Registry(str(folder))
    contents = [b'{"model.layers.%d.mlp.up_proj.weight":' % layer + bytes(3000) for layer in range(4)]
    for layer, plain in enumerate(contents):
        keyring.package(f"layer.{layer}", plain, registry)
    files = list(folder.rglob("*"))
    assert len(files) == 4
    assert {len(path.name) for path in files} == {64}
    assert len({path.stat().st_size for path in files}) == 1
    told = b"".join(path.name.encode() + path.read_bytes() for path in files)
    assert not [word for word in (b"layer", b"model", b"mlp", b"proj", b"weight") if word in told]
    assert not [hash_ for hash_ in (hashlib.sha256(plain).hexdigest().encode() for plain in contents) if hash_ in told]


def test_the_keyring_is_readable_by_its_owner_only(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    keyring.package("layer.0", b"weights", Registry(str(folder)))
    assert stat.S_IMODE((tmp_path / "state" / "keyring.json").stat().st_mode) == 0o600


def test_a_keyring_that_cannot_be_written_stays_as_it_was(folder: Path, keyring: Keyring, tmp_path: Path) -> None:
    registry = Registry(str(folder))
    first = keyring.package("layer.0", b"weights", registry)
    path = tmp_path / "state" / "keyring.json"
    with file_size_limit(path.stat().st_size + 10), pytest.raises(ShardError, match="cannot be written"):
        keyring.package("layer.1", b"weights", registry)
    assert list(path.parent.iterdir()) == [path]
    assert Keyring(path).entry("layer.0") == keyring.entry("layer.0") == first
    with pytest.raises(ShardError, match=r"layer\.1"):
        keyring.entry("layer.1")


@pytest.mark.parametrize("content", ["", "[]", '{"layer.0": 3}', json.dumps({"layer.0": {"shard": "x", "key": "?"}})])
def test_a_broken_keyring_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "keyring.json").write_text(content)
    with pytest.raises(ShardError, match=r"keyring\.json"):
        Keyring(tmp_path / "keyring.json")


def test_a_large_shard_makes_the_round_trip(registry: Registry) -> None:
    plain, key = bytes(range(256)) * 20_000, new_key()
    assert open_shard(registry.get(registry.put(seal(plain, key))), key) == plain
