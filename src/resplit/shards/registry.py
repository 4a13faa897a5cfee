"""Where sealed shards lie, under names that tell nothing, and the controller's private list of what they are.

Knows sealed bytes, places and block names; knows nothing of models, or of which node holds what.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec

from resplit.errors import ShardError
from resplit.files import write_atomically

_NAME = re.compile(r"[0-9a-f]{64}")


class Registry:
    """A folder or bucket (any fsspec URL) of sealed shards. A shard's name is the SHA-256 of its ciphertext."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._root = fsspec.core.url_to_fs(url)

    def put(self, sealed: bytes) -> str:
        """Store a sealed shard whole or not at all, and return its name; ShardError if there is no room or no way."""
        name = hashlib.sha256(sealed).hexdigest()
        if self._size(name) == len(sealed):
            return name
        new = f"{self._root}/.{uuid.uuid4().hex}.new"
        with self._reached("make room there, or choose another registry"):
            try:
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(new, sealed)
                self._files.mv(new, self._path(name))
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong first is what the caller must hear
                    self._files.rm_file(new)
                raise
        return name

    def get(self, name: str) -> bytes:
        """The sealed shard called `name`; ShardError if it is missing, not what its name says, or out of reach."""
        with self._reached("see that it can be reached from here"):
            try:
                sealed: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                raise ShardError(f"shard {name} is not in {self.url}; package the model again") from None
        if hashlib.sha256(sealed).hexdigest() != name:
            raise ShardError(f"shard {name} in {self.url} is corrupt; delete it and package the model again")
        return sealed

    def has(self, name: str) -> bool:
        """Whether a shard of this name is there; its content is not looked at."""
        return self._size(name) is not None

    def delete(self, name: str) -> None:
        """Remove a shard; nothing happens if it is not there."""
        with self._reached("see that it can be written to"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _size(self, name: str) -> int | None:
        with self._reached("see that it can be reached from here"):
            try:
                return int(self._files.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ShardError(f"{name!r:.80} is not the name of a shard")
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _reached(self, remedy: str) -> Iterator[None]:
        """Whatever a file system raises, in the registry's words: each fsspec backend has errors of its own."""
        try:
            yield
        except ShardError:
            raise
        except Exception as error:
            raise ShardError(f"registry {self.url}: {error or type(error).__name__}; {remedy}") from error


@dataclass(frozen=True)
class KeyringEntry:
    """What the controller knows of one block's shard: its name, its data key, the SHA-256 of its content."""

    shard: str
    key: bytes
    content: str


class Keyring:
    """The controller's private file of blocks: which shard is whose, and how to open it. Mode 0600.

    Content hashes stay here: in the registry they would tell which public model is served.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read_entries(path)

    def __getitem__(self, block: str) -> KeyringEntry:
        """What is known of `block`; ShardError if it was never packaged."""
        try:
            return self._entries[block]
        except KeyError:
            raise ShardError(f"{self._path}: block {block!r} has no shard; package the model first") from None

    def find(self, block: str, content: str) -> KeyringEntry | None:
        """What is known of `block` if its content has the SHA-256 `content`: such a block needs no new shard."""
        known = self._entries.get(block)
        return known if known is not None and known.content == content else None

    def add(self, block: str, content: str, shard: str, key: bytes) -> KeyringEntry:
        """Note a block's new shard, in place of an older one; ShardError if it cannot be written."""
        entry = KeyringEntry(shard, key, content)
        entries = self._entries | {block: entry}
        _write_entries(self._path, entries)
        self._entries = entries
        return entry


def _read_entries(path: Path) -> dict[str, KeyringEntry]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            block: KeyringEntry(entry["shard"], base64.b64decode(entry["key"], validate=True), entry["content"])
            for block, entry in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: not a readable keyring ({error}); move it away and package again") from None


def _write_entries(path: Path, entries: dict[str, KeyringEntry]) -> None:
    stored = {block: asdict(entry) | {"key": base64.b64encode(entry.key).decode()} for block, entry in entries.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(stored, indent=1), 0o600)
    except OSError as error:
        raise ShardError(f"{path}: the keyring cannot be written ({error.strerror}); make room there") from None
