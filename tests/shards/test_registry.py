"""The registry over local folders and other file systems."""

from __future__ import annotations

import hashlib
import os
import threading
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
    assert registry.get(name, 6) == b"sealed"
    assert registry.has(name, 6)
    assert not registry.has(name, 7)
    assert registry.put(b"sealed") == name


def test_a_deleted_shard_is_gone_and_can_be_deleted_again(registry: Registry) -> None:
    name = registry.put(b"sealed")
    registry.delete(name)
    registry.delete(name)
    assert not registry.has(name, 6)
    with pytest.raises(ShardError, match="package the model again"):
        registry.get(name, 6)


def test_an_empty_registry_has_no_shards(registry: Registry) -> None:
    assert not registry.has("0" * 64, 6)
    with pytest.raises(ShardError, match="is not in"):
        registry.get("0" * 64, 6)


def test_a_corrupt_shard_is_not_returned(folder: Path) -> None:
    registry = Registry(str(folder))
    name = registry.put(bytes(1000))
    content = bytearray((folder / name).read_bytes())
    content[500] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ShardError, match="corrupt"):
        registry.get(name, 1000)


def test_a_truncated_shard_is_replaced_by_the_next_put(folder: Path) -> None:
    registry = Registry(str(folder))
    name = registry.put(b"sealed")
    (folder / name).write_bytes(b"sea")
    registry.put(b"sealed")
    assert registry.get(name, 6) == b"sealed"


@pytest.mark.parametrize("name", ["", "../secret", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 64 + "/x"])
def test_a_name_that_is_not_a_hash_is_refused(registry: Registry, name: str) -> None:
    for call in (lambda: registry.get(name, 6), lambda: registry.has(name, 6), lambda: registry.delete(name)):
        with pytest.raises(ShardError, match="not the name of a shard"):
            call()


def test_a_full_disk_leaves_no_partial_shard(folder: Path, full_disk: FullDisk) -> None:
    registry = Registry(str(folder))
    kept = registry.put(b"small")
    with full_disk(4096), pytest.raises(ShardError, match="make room"):
        registry.put(bytes(100_000))
    assert [path.name for path in folder.iterdir()] == [kept]
    assert registry.get(registry.put(bytes(100_000)), 100_000) == bytes(100_000)


def test_an_error_names_the_registry_that_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    registry = Registry(str(tmp_path / "file" / "shards"))
    for call in (lambda: registry.put(b"sealed"), lambda: registry.get("0" * 64, 6)):
        with pytest.raises(ShardError, match="file/shards"):
            call()


def test_a_large_shard_is_stored_and_read_back(registry: Registry) -> None:
    plain, key = bytes(range(256)) * 20_000, new_key()
    sealed = seal(plain, key)
    assert open_shard(registry.get(registry.put(sealed), len(sealed)), key) == plain


def test_a_file_of_another_size_is_refused_unread(folder: Path) -> None:
    registry = Registry(str(folder))
    name = registry.put(b"sealed")
    with (folder / name).open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(ShardError, match=f"{name} is corrupt: it has {2**40} bytes, and the shard has 6; delete it"):
        registry.get(name, 6)


def test_of_a_larger_object_only_the_size_of_the_shard_is_read() -> None:
    registry = Registry(f"memory://{uuid.uuid4().hex}")
    name = registry.put(b"sealed")
    registry._files.pipe_file(registry._path(name), b"sealed" + bytes(1000))
    assert registry.get(name, 6) == b"sealed"


def put_in_place(path: Path, kind: str) -> None:
    """Something other than a shard at `path`."""
    path.parent.mkdir()
    match kind:
        case "a link to a device":
            path.symlink_to("/dev/zero")
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()


@pytest.mark.parametrize("kind", ["a link to a device", "a pipe", "a folder"])
def test_what_is_no_regular_file_is_refused(folder: Path, kind: str) -> None:
    name = hashlib.sha256(b"sealed").hexdigest()
    put_in_place(folder / name, kind)
    registry = Registry(str(folder))
    assert not registry.has(name, 6)
    with pytest.raises(ShardError, match=f"{name} is not a regular file; delete it and package the model again"):
        registry.get(name, 6)


@pytest.mark.parametrize("kind", ["a link to a device", "a pipe"])
def test_a_link_or_pipe_in_a_shards_place_is_replaced_by_the_next_put(folder: Path, kind: str) -> None:
    name = hashlib.sha256(b"sealed").hexdigest()
    put_in_place(folder / name, kind)
    registry = Registry(str(folder))
    assert registry.get(registry.put(b"sealed"), 6) == b"sealed"


def test_a_link_to_a_shard_is_followed(folder: Path, tmp_path: Path) -> None:
    registry, name = Registry(str(folder)), hashlib.sha256(b"sealed").hexdigest()
    (tmp_path / "elsewhere").write_bytes(b"sealed")
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert registry.get(name, 6) == b"sealed"


def test_a_registry_that_hangs_is_an_error_within_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, hangs = Registry(f"memory://{uuid.uuid4().hex}", within_s=0.1), threading.Event()
    for call in ("cat_file", "info", "pipe_file", "rm_file"):
        monkeypatch.setattr(registry._files, call, lambda *_, **__: hangs.wait(60))
    try:
        for access in (
            lambda: registry.get("0" * 64, 6),
            lambda: registry.has("0" * 64, 6),
            lambda: registry.put(b"sealed"),
            lambda: registry.delete("0" * 64),
        ):
            with pytest.raises(ShardError, match=r"no answer within 0\.1 s"):
                access()
    finally:
        hangs.set()
