"""The controller's keyring: which shard holds which block, and the key that opens it."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from resplit.errors import ShardError
from resplit.files import write_atomically


@dataclass(frozen=True)
class KeyringEntry:
    """The shard of one block: its name in the registry and size, its data key, and the SHA-256 of its plain content."""

    shard: str
    sealed_bytes: int
    key: bytes
    content: str


class Keyring:
    """The controller's private file (mode 0600) of block names and their shards.

    The hashes of plain contents are only here: in the registry they would reveal which public model is served.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read_entries(path)

    def __getitem__(self, block: str) -> KeyringEntry:
        """The entry of `block`; ShardError if it was never packaged."""
        try:
            return self._entries[block]
        except KeyError:
            raise ShardError(f"{self._path}: block {block!r} has no shard; package the model first") from None

    def find(self, block: str, content: str) -> KeyringEntry | None:
        """The entry of `block` if its plain content has the SHA-256 `content`: then its shard can be used again."""
        known = self._entries.get(block)
        return known if known is not None and known.content == content else None

    @property
    def largest_sealed_bytes(self) -> int:
        """The size of the largest shard; 0 without any."""
        return max((entry.sealed_bytes for entry in self._entries.values()), default=0)

    def add(self, block: str, entry: KeyringEntry) -> KeyringEntry:
        """Store the shard of `block`, replacing an earlier one; ShardError if the file cannot be written."""
        entries = self._entries | {block: entry}
        _write_entries(self._path, entries)
        self._entries = entries
        return entry


def _read_entries(path: Path) -> dict[str, KeyringEntry]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            block: KeyringEntry(
                entry["shard"],
                int(entry["sealed_bytes"]),
                base64.b64decode(entry["key"], validate=True),
                entry["content"],
            )
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
