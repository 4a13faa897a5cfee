"""The registry: a shared folder or bucket of sealed shards, each stored under the hash of its ciphertext."""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from collections.abc import Iterator

import fsspec

from resplit.errors import ShardError

_NAME = re.compile(r"[0-9a-f]{64}")


class Registry:
    """A folder or bucket (any fsspec URL) of sealed shards. The name of a shard is the SHA-256 of its ciphertext."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._root = fsspec.core.url_to_fs(url)

    def put(self, sealed: bytes) -> str:
        """Store a sealed shard in one step and return its name; ShardError if the registry cannot be written."""
        name = hashlib.sha256(sealed).hexdigest()
        if self._size(name) == len(sealed):
            return name
        partial = f"{self._root}/.{uuid.uuid4().hex}.new"
        with self._registry_errors("make room there, or choose another registry"):
            try:
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(partial, sealed)
                self._files.mv(partial, self._path(name))
            except BaseException:
                with contextlib.suppress(Exception):  # the caller must see the first error, not this one
                    self._files.rm_file(partial)
                raise
        return name

    def get(self, name: str) -> bytes:
        """The sealed shard called `name`; ShardError if it is missing, corrupt or cannot be reached."""
        with self._registry_errors("check that this machine can reach it"):
            try:
                sealed: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                raise ShardError(f"shard {name} is not in {self.url}; package the model again") from None
        if hashlib.sha256(sealed).hexdigest() != name:
            raise ShardError(f"shard {name} in {self.url} is corrupt; delete it and package the model again")
        return sealed

    def has(self, name: str) -> bool:
        """Whether a shard of this name exists. ShardError if the registry cannot be reached."""
        return self._size(name) is not None

    def delete(self, name: str) -> None:
        """Remove a shard if it exists; ShardError if the registry cannot be written."""
        with self._registry_errors("check that it can be written to"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _size(self, name: str) -> int | None:
        with self._registry_errors("check that this machine can reach it"):
            try:
                return int(self._files.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ShardError(f"{name!r:.80} is not the name of a shard (64 hexadecimal digits)")
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _registry_errors(self, remedy: str) -> Iterator[None]:
        """Turn every error of the file system into ShardError: each fsspec backend raises exceptions of its own."""
        try:
            yield
        except ShardError:
            raise
        except Exception as error:
            raise ShardError(f"registry {self.url}: {error or type(error).__name__}; {remedy}") from error
