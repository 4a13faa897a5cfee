"""Shards of a registry, of which a node keeps some in a folder of its own, so that it need not fetch them again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from resplit.errors import ShardError
from resplit.shards.registry import Registry
from resplit.units import shown_bytes


class DiskFullError(ShardError):
    """There is no room for a shard in the folder. It may still be read."""


class KeptShards:
    """Reads from `registry`, and from `folder` what is kept there. Without a folder nothing is kept.

    Nor is it from a registry that is a folder itself: its shards are on a disk already.

    The shards stay sealed. A kept one that is damaged is fetched again. Methods block, as those of `Registry` do.
    """

    def __init__(self, registry: Registry, folder: Path | None = None) -> None:
        self._registry = registry
        self._folder = None if registry.is_folder else folder
        self._kept = Registry(str(folder)) if self._folder else None

    def get(self, name: str, size_bytes: int, within_s: float | None = None) -> bytes:
        """The sealed shard called `name`; the time and the errors are those of `Registry.get`."""
        if self._kept:
            try:
                return self._kept.get(name, size_bytes, within_s)
            except ShardError:
                pass  # it is not kept, or damaged
        return self._registry.get(name, size_bytes, within_s)

    def fetch(self, name: str, size_bytes: int) -> int:
        """Keep a shard. Returns the bytes that were fetched for it; ShardError if it cannot be fetched or stored.

        DiskFullError if there is no room for it: then nothing is fetched.
        """
        if self._kept is None or self._folder is None or self._kept.has(name, size_bytes):
            return 0
        _make_room_sure(self._folder, size_bytes)
        self._kept.put(self._registry.get(name, size_bytes))
        return size_bytes

    def keep_only(self, names: Collection[str]) -> None:
        """Keep no other shards than these."""
        if self._kept:
            for name in set(self._names()).difference(names):
                self._kept.delete(name)

    @property
    def kept_bytes(self) -> int:
        """The size of all shards that are kept."""
        return sum((self._folder / name).stat().st_size for name in self._names()) if self._folder else 0

    def _names(self) -> list[str]:
        """What lies in the folder. The file of a write that a crash ended begins with a dot, and is not counted."""
        if self._folder is None or not self._folder.is_dir():
            return []
        return [name for name in os.listdir(self._folder) if not name.startswith(".")]


def _make_room_sure(folder: Path, size_bytes: int) -> None:
    """Make the folder; ShardError if that is not possible, DiskFullError if a shard of this size has no room there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise ShardError(f"{folder}: no shard can be kept there ({error.strerror}); check its permissions") from None
    if free_bytes < size_bytes:
        needed, free = shown_bytes(size_bytes), shown_bytes(free_bytes)
        raise DiskFullError(f"{folder}: there is no room to keep a shard of {needed}, {free} are free; make room there")
