"""The registry: a shared folder or bucket of sealed shards, each stored under the hash of its ciphertext.

Others can write to it. So an access reads no more than the size that is wanted, and ends within a time limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from resplit.errors import ConfigError, ShardError

_NAME = re.compile(r"[0-9a-f]{64}")
_ACCESS_WITHIN_S = 45.0
_ABANDONED_AFTER_S = 3600.0
Result = TypeVar("Result")


class Registry:
    """A folder or bucket (any fsspec URL) of sealed shards. The name of a shard is the SHA-256 of its ciphertext.

    ConfigError if the URL's kind is unknown, or needs a package that is missing. No method takes longer than
    `within_s`: then it raises ShardError. All block: call them outside the event loop.
    """

    def __init__(self, url: str, within_s: float = _ACCESS_WITHIN_S) -> None:
        self.url = url
        self._within_s = within_s
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each backend raises exceptions of its own
            raise ConfigError(f"registry {url}", f"cannot be used: {error or type(error).__name__}") from error

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return isinstance(self._files, LocalFileSystem)

    def put(self, sealed: bytes) -> str:
        """Store a sealed shard in one step and return its name; ShardError if the registry cannot be written."""
        name = hashlib.sha256(sealed).hexdigest()
        path, partial = self._path(name), f"{self._root}/.{uuid.uuid4().hex}.new"

        def store() -> None:
            if self._size(path) == len(sealed):
                return
            try:
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(partial, sealed)
                self._files.mv(partial, path)
            except BaseException:
                with contextlib.suppress(Exception):  # the caller must see the first error, not this one
                    self._files.rm_file(partial)
                raise

        self._access(store, "make room there, or choose another registry")
        return name

    def get(self, name: str, size_bytes: int, within_s: float | None = None) -> bytes:
        """The sealed shard called `name`; at most its `size_bytes` are read. `within_s` replaces the registry's own.

        ShardError if it is missing, no regular file of that size, corrupt, or cannot be reached.
        """
        path = self._path(name)
        try:
            read, remedy = partial(self._read, path, size_bytes), "check that this machine can reach it"
            sealed = self._access(read, remedy, within_s)
        except FileNotFoundError:
            raise ShardError(f"shard {name} is not in {self.url}; package the model again") from None
        if hashlib.sha256(sealed).hexdigest() != name:
            raise ShardError(f"shard {name} in {self.url} is corrupt; delete it and package the model again")
        return sealed

    def has(self, name: str, size_bytes: int) -> bool:
        """Whether a shard of this name and size exists. ShardError if the registry cannot be reached."""
        path = self._path(name)
        return self._access(lambda: self._size(path), "check that this machine can reach it") == size_bytes

    def delete(self, name: str) -> None:
        """Remove a shard if it exists; ShardError if the registry cannot be written."""
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            self._access(lambda: self._files.rm_file(path), "check that it can be written to")

    def delete_abandoned(self) -> None:
        """Delete from a folder what killed writers left half written: whatever is too old to be still written."""
        if not self.is_folder:
            return
        oldest_s = time.time() - _ABANDONED_AFTER_S
        for part in Path(self._root).glob(".*.new"):
            with contextlib.suppress(OSError):  # another process may be faster
                if part.stat().st_mtime < oldest_s:
                    part.unlink()

    def _read(self, path: str, size_bytes: int) -> bytes:
        if isinstance(self._files, LocalFileSystem):
            return _read_regular(path, size_bytes)
        content: bytes = self._files.cat_file(path, end=size_bytes)
        return content

    def _size(self, path: str) -> int | None:
        """The size of the regular file at `path`; None for anything else."""
        try:
            info = self._files.info(path)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ShardError(f"{name!r:.80} is not the name of a shard (64 hexadecimal digits)")
        return f"{self._root}/{name}"

    def _access(self, call: Callable[[], Result], remedy: str, within_s: float | None = None) -> Result:
        """The result of `call`. Its errors become ShardError, as does a call that takes too long.

        FileNotFoundError remains. Every other fsspec backend raises exceptions of its own.
        """
        limit_s = self._within_s if within_s is None else within_s
        try:
            return _within(limit_s, call)
        except (ShardError, FileNotFoundError):
            raise
        except TimeoutError:
            raise ShardError(f"registry {self.url}: no answer within {limit_s:.3g} s; {remedy}") from None
        except Exception as error:
            raise ShardError(f"registry {self.url}: {error or type(error).__name__}; {remedy}") from error


def _within(limit_s: float, call: Callable[[], Result]) -> Result:
    """The result of `call`; TimeoutError after `limit_s` seconds.

    A call that hangs cannot be stopped. It stays in a daemon thread, which does not keep the process from ending.
    """
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="registry", daemon=True).start()
    return result.result(limit_s)


def _read_regular(path: str, size_bytes: int) -> bytes:
    """Content of a regular file of exactly `size_bytes`; ShardError for any other file, of which nothing is read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK a pipe would hang
    try:
        _check_regular(path, os.fstat(descriptor), size_bytes)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(size_bytes)
    finally:
        os.close(descriptor)


def _check_regular(path: str, found: os.stat_result, size_bytes: int) -> None:
    remedy = "delete it and package the model again"
    if not stat.S_ISREG(found.st_mode):
        raise ShardError(f"{path} is not a regular file; {remedy}")
    if found.st_size != size_bytes:
        raise ShardError(f"{path} is corrupt: it has {found.st_size} bytes, and the shard has {size_bytes}; {remedy}")
