"""Stand-by blocks: what a node keeps ready although no epoch needs it, because the next one may.

Their shards lie in a folder, and as many of them as fit are loaded. All of it makes way for anything else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor as Pool
from functools import partial

import structlog

from resplit.errors import ResplitError
from resplit.node.executor import Executor
from resplit.process.cancellation import VitalTasks, to_its_end
from resplit.shards.kept import DiskFullError, KeptShards
from resplit.shards.sealing import open_shard
from resplit.status import StandbyState
from resplit.wire.commands import Standby, WrappedShard

_log = structlog.get_logger(__name__)
# To make a block ready takes so many times its own time until the next one begins: it is not urgent, and passes and
# messages of this node are late meanwhile.
REST = 3.0
_AGAIN_AFTER_S = 30.0  # what failed, for example on a full disk, is tried again so much later


class StandbyBlocks:
    """The stand-by blocks of one node. `may_hold` says whether it may hold a block now; it is asked from any thread.

    `loader` is the thread in which blocks are loaded, `loading` is held while it loads: what an epoch needs goes first.
    """

    def __init__(
        self,
        shards: KeptShards,
        unwrap: Callable[[bytes, str], bytes],
        may_hold: Callable[[int], bool],
        loader: Pool,
        loading: asyncio.Lock,
        tasks: VitalTasks,
    ) -> None:
        self._shards = shards
        self._unwrap = unwrap
        self._may_hold = may_hold
        self._loader = loader
        self._loading = loading
        self._tasks = tasks
        self._command: Standby | None = None  # the newest one
        self._loaded_bytes = self._fetched_bytes = self._kept_bytes = 0
        self._processor_s = 0.0

    def wants(self, block: int) -> bool:
        """Whether a block that no epoch needs any more should stay loaded."""
        return self._command is not None and block in self._command.blocks and self._may_hold(block)

    def follow(self, command: Standby, executor: Executor) -> None:
        """Begin to keep the blocks of a command ready, in place of those of the command before it."""
        self._command = command
        executor.memory.keep_standby(command.blocks)
        self._tasks.spawn(self._keep_ready(command, executor), "stand-by blocks")

    def forbid(self, executor: Executor | None) -> None:
        """Drop what this node may not hold any more, at once."""
        allowed = [block for block in self._command.blocks if self._may_hold(block)] if self._command else []
        if executor:
            executor.memory.keep_standby(allowed)
        self._shards.keep_only({self._command.shards[block].name for block in allowed} if self._command else ())

    def state(self, executor: Executor | None) -> StandbyState:
        """What stands by, and what that has cost since the node started."""
        blocks = executor.memory.standby if executor else ()
        return StandbyState(
            blocks=blocks,
            memory_bytes=float(
                sum(executor.engine.features[block].weight_bytes for block in blocks) if executor else 0
            ),
            disk_bytes=self._kept_bytes,
            loaded_bytes=self._loaded_bytes,
            fetched_bytes=self._fetched_bytes,
            processor_s=self._processor_s,
        )

    async def _keep_ready(self, command: Standby, executor: Executor) -> None:
        """Make the blocks of a command ready, unless a newer one comes. While a disk is full, that is tried again."""
        try:
            await self._in_turn(command, lambda: self._shards.keep_only({s.name for s in command.shards.values()}))
            not_kept = await self._make_all_ready(command, executor, command.blocks)
            for error in list(not_kept.values())[:1]:
                _log.warning("stand-by blocks are not kept on disk", blocks=list(not_kept), error=str(error))
            while not_kept and self._command is command:
                await asyncio.sleep(_AGAIN_AFTER_S)
                not_kept = await self._make_all_ready(command, executor, list(not_kept))
        except ResplitError as error:  # the next epoch can do without
            _log.warning("a stand-by block is not ready", error=str(error))

    async def _make_all_ready(
        self, command: Standby, executor: Executor, blocks: Sequence[int]
    ) -> dict[int, DiskFullError]:
        """Make one block after another ready. Returns those for which the disk has no room."""
        not_kept: dict[int, DiskFullError] = {}
        for block in blocks:
            try:
                took_s = await self._in_turn(command, partial(self._make_ready, executor, block, command.shards[block]))
                await asyncio.sleep(REST * took_s)
            except DiskFullError as error:
                not_kept[block] = error
        return not_kept

    async def _in_turn(self, command: Standby, work: Callable[[], None]) -> float:
        """Work in the loader's thread, unless a newer command came. An epoch waits for one piece of work at most.

        Returns the seconds of the work.
        """
        async with self._loading:
            begun_s = time.monotonic()
            if self._command is command:
                await to_its_end(asyncio.get_running_loop().run_in_executor(self._loader, self._timed, work))
            return time.monotonic() - begun_s

    def _timed(self, work: Callable[[], None]) -> None:
        begun_s = time.thread_time()
        try:
            work()
        finally:
            self._processor_s += time.thread_time() - begun_s

    def _make_ready(self, executor: Executor, block: int, shard: WrappedShard) -> None:
        """Have a shard on disk, and load it if memory has room. DiskFullError if the disk has none."""
        if not self._may_hold(block):
            return
        try:
            self._fetched_bytes += self._shards.fetch(shard.name, shard.sealed_bytes)
        except DiskFullError:
            self._load(executor, block, shard)
            raise
        self._kept_bytes = self._shards.kept_bytes
        self._load(executor, block, shard)

    def _load(self, executor: Executor, block: int, shard: WrappedShard) -> None:
        """Load a block if memory has room and the node may hold it."""
        if block not in executor.engine.blocks and executor.memory.has_room_for(block):
            content = open_shard(self._shards.get(shard.name, shard.sealed_bytes), self._unwrap(shard.key, shard.name))
            if executor.memory.stand_by(block, content, lambda: self._may_hold(block)):
                self._loaded_bytes += shard.sealed_bytes
        if not self._may_hold(block):  # trust ended meanwhile
            self.forbid(executor)
