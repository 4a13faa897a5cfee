"""The epochs that a node has prepared and serves, and the blocks that it holds for them.

A node makes no decisions about placements. It obeys the controller, and refuses commands that its memory, its trust or
the order of epochs does not allow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from resplit.config import ClusterConfig
from resplit.errors import CapacityError, CommandRefusedError, DataError, ResplitError, ShardError
from resplit.model.engines import open_engine
from resplit.model.spec import ModelSpec
from resplit.node.emulation import Hardware
from resplit.node.executor import Executor
from resplit.node.memory import reserved_bytes
from resplit.node.permits import Permits
from resplit.node.standby import StandbyBlocks
from resplit.process.cancellation import VitalTasks, to_its_end
from resplit.process.garbage import freeze_startup_objects
from resplit.shards.kept import KeptShards
from resplit.shards.sealing import open_shard
from resplit.wire.commands import (
    Abort,
    Clear,
    Commit,
    Prepare,
    Profile,
    Recall,
    Release,
    Reply,
    Standby,
    Trust,
    WrappedShard,
)
from resplit.wire.routes import Route

# The part of a command's time after which a node gives up loading, so that its answer, with the reason, comes in time.
_LOAD_SHARE = 0.8


class Hosting:
    """The epochs and blocks of the node `name`. `unwrap(wrapped key, shard name)` opens a data key wrapped for it.

    The life of an epoch here: prepare -> commit -> release, or prepare -> abort. Between commands, every block that a
    route in `prepared` or `routes` places on this node is loaded, and no other block is, except after `clear`. Others
    may stand by (`node.standby`).
    """

    def __init__(
        self, name: str, cluster: ClusterConfig, shards: KeptShards, unwrap: Callable[[bytes, str], bytes]
    ) -> None:
        config = cluster.node(name)
        self.name = name
        self.memory_bytes = config.memory
        self.hardware = Hardware.declared(config.emulate) if config.emulate else None
        self.trusted = name in cluster.trusted
        self.permits = Permits()
        self.tasks = VitalTasks()
        self.executor: Executor | None = None  # made when the first command names a model
        self.prepared: dict[int, Route] = {}  # by epoch: loaded, not yet served
        self.routes: dict[int, Route] = {}  # by epoch: served, committed and not released
        self.committed = 0  # the newest committed epoch
        self._aborted = 0  # the newest aborted epoch
        self._private: frozenset[int] = frozenset()
        self._cleared: frozenset[int] = frozenset()  # blocks without weights whose caches are still here
        self._kv_tokens = cluster.kv_tokens
        self._threads, self._device = config.threads, config.device
        self._shards = shards
        self._unwrap = unwrap
        self._loader = ThreadPoolExecutor(1, "loader")
        self._loading = asyncio.Lock()
        self.standby = StandbyBlocks(shards, unwrap, self._may_hold, self._loader, self._loading, self.tasks)
        self._spec: ModelSpec | None = None

    def running(self) -> Executor:
        """The executor; DataError before the first model was loaded."""
        if self.executor is None:
            raise DataError(f"{self.name} holds no model yet")
        return self.executor

    def refuse_private(self, blocks: Iterable[int]) -> None:
        """CommandRefusedError if this node is not trusted and one of `blocks` is private."""
        forbidden = sorted(block for block in blocks if not self._may_hold(block))
        if forbidden:
            reason = f"{self.name} is not trusted and may not hold blocks {forbidden} or their caches"
            raise CommandRefusedError("privacy", reason)

    def _may_hold(self, block: int) -> bool:
        return self.trusted or block not in self._private

    async def stand_by(self, command: Standby) -> Reply:
        """Begin to keep blocks ready for the next epoch, in the background. They make way for anything else.

        CommandRefusedError for another model, an unknown block, or a private one that may not be here.
        """
        executor = await self._start_executor(command.model)
        self._private = command.private
        self.refuse_private(command.blocks)
        if unknown := sorted(
            b for b in command.blocks if b not in command.shards or b >= len(executor.engine.features)
        ):
            raise CommandRefusedError("malformed", f"stand-by blocks {unknown} have no shard, or are not in the model")
        self.standby.follow(command, executor)
        return {}

    async def prepare(self, command: Prepare) -> Reply:
        """Load the blocks that an epoch places here and that are not loaded yet; nothing serves the epoch yet.

        With `replace_current`, the epochs served so far end first: the cluster cannot serve them any more.

        Raises CommandRefusedError for an aborted epoch, another model or a private block that may not be here, and with
        reason "insufficient_memory" if the blocks fit, but not beside those that are held; CapacityError if they do
        not fit at all; ShardError if a shard cannot be fetched and opened in time. After an error no new block stays
        loaded.
        """
        route, begun_s = command.route, time.monotonic()
        if route.epoch <= self._aborted:  # the command was delayed on its way
            raise CommandRefusedError("stale", f"epoch {route.epoch} was aborted")
        executor = await self._start_executor(command.model)
        blocks = route.blocks_of(self.name)
        self._private = command.private
        self.refuse_private(blocks)
        if command.replace_current:
            self.routes, self.prepared = {}, {}
            # The caches stay, as replicas: the new nodes get them from here.
            self._drop_unwanted(keep=blocks, drop=executor.engine.unload)
        executor.memory.expected = frozenset(blocks)
        self._ensure_room(blocks, command.kv_tokens)
        loaded = await self._load(blocks, command.shards, begun_s + _LOAD_SHARE * command.within_s)
        self.prepared[route.epoch] = route
        return {"loaded": loaded}

    async def clear(self, command: Clear) -> Reply:
        """Make room for an epoch that does not fit beside the current one: drop the weights that it does not need.

        This node serves nothing from then on. Caches stay until the epoch is prepared or aborted, to be transferred.
        """
        wanted, executor = command.route.blocks_of(self.name), self.running()
        self.routes, self.prepared = {}, {}
        self._cleared = frozenset(executor.memory.hosted) - frozenset(wanted)
        executor.memory.expected = frozenset(wanted)
        for block in self._cleared:
            executor.engine.unload(block)
        return {"cleared": sorted(self._cleared)}

    async def commit(self, command: Commit) -> Reply:
        """Serve a prepared epoch from now on; earlier epochs stay until they are released."""
        epoch = command.epoch
        route = self.prepared.pop(epoch, None) or self.routes.get(epoch)
        if route is None:
            raise CommandRefusedError("unprepared", f"epoch {epoch} was not prepared here")
        self.routes[epoch] = route
        self.committed = max(self.committed, epoch)
        return {}

    async def abort(self, command: Abort) -> Reply:
        """Forget a prepared epoch and free the blocks that only it needed."""
        self.prepared.pop(command.epoch, None)
        self._aborted = max(self._aborted, command.epoch)
        return {"dropped": self._drop_unwanted()}

    async def release(self, command: Release) -> Reply:
        """End every epoch before `epoch`, committed or only prepared, and free the blocks that only they needed."""
        oldest = command.epoch
        self.routes = {number: route for number, route in self.routes.items() if number >= oldest}
        self.prepared = {number: route for number, route in self.prepared.items() if number >= oldest}
        return {"dropped": self._drop_unwanted()}

    async def recall(self, command: Recall) -> Reply:
        """Give back the passes of earlier epochs that have not begun."""
        if self.executor:
            self.executor.recall(command.epoch)
        return {}

    async def trust(self, command: Trust) -> Reply:
        """Set whether the node is trusted. If not, drop private blocks at once and end epochs that place them here."""
        self.trusted, self._private = command.trusted, command.private
        if self.trusted:
            return {}
        ended = {
            number
            for number, route in (self.routes | self.prepared).items()
            if self._private.intersection(route.blocks_of(self.name))
        }
        self.routes = {number: route for number, route in self.routes.items() if number not in ended}
        self.prepared = {number: route for number, route in self.prepared.items() if number not in ended}
        self.standby.forbid(self.executor)
        if self.executor:
            for block in self._private:
                self.executor.engine.drop(block)
        return {"ended": sorted(ended)}

    async def profile(self, command: Profile, time_block: Callable[[Executor, int], Awaitable[None]]) -> Reply:
        """Load blocks one at a time, call `time_block` for each, and drop it unless an epoch needs it."""
        until_s = time.monotonic() + _LOAD_SHARE * command.within_s
        executor = await self._start_executor(command.model)
        self._private = command.private
        for block in command.blocks:
            self.refuse_private((block,))
            try:
                await self._load((block,), command.shards, until_s)
                await time_block(executor, block)
            finally:
                self._drop_unwanted()
        return {}

    def change_hardware(self, slowdown: float | None, background_utilization: float | None) -> None:
        """Change the emulated hardware; None keeps a value. CommandRefusedError on real hardware."""
        if self.hardware is None:
            raise CommandRefusedError("real", f"{self.name} is real hardware and emulates no other")
        self.hardware = self.hardware.changed(slowdown, background_utilization)
        if self.executor:
            self.executor.hardware = self.hardware

    async def _start_executor(self, spec: ModelSpec) -> Executor:
        """The executor for this model; CommandRefusedError if it runs another one."""
        if self.executor is None:
            engine = await asyncio.to_thread(open_engine, spec, self._threads, self._device)
            self.executor = Executor(engine, self.memory_bytes, self.hardware, self._kv_tokens, self.permits)
            self._spec = spec
            self.tasks.spawn(_until_ended(self.executor), "executor")
            freeze_startup_objects()
        elif spec != self._spec:
            raise CommandRefusedError("model", f"{self.name} already runs another model; restart it to change")
        return self.executor

    def _ensure_room(self, blocks: tuple[int, ...], kv_tokens: float) -> None:
        """Refuse `blocks` whose weights and reserved caches do not fit, alone or together with the loaded blocks."""
        engine, hosted = self.running().engine, self.running().memory.hosted
        if (more := reserved_bytes(engine, blocks, kv_tokens) - self.memory_bytes) > 0:
            raise CapacityError(f"its blocks need {more / 2**20:.1f} MiB more than {self.name} has")
        both = {*blocks, *hosted}
        if (more := reserved_bytes(engine, both, kv_tokens) - self.memory_bytes) > 0:
            raise CommandRefusedError(
                "insufficient_memory",
                f"old and new blocks together need {more / 2**20:.1f} MiB more than {self.name} has",
            )

    async def _load(self, blocks: tuple[int, ...], shards: Mapping[int, WrappedShard], until_s: float) -> list[int]:
        """Fetch, open and load those of `blocks` that are not loaded. Returns their indices.

        ShardError if they are not loaded at `until_s` (monotonic clock).
        """
        executor = self.running()
        executor.memory.claim(blocks)
        missing = [block for block in blocks if block not in executor.engine.blocks]
        try:
            for block in missing:
                await self._load_in_turn(executor, block, shards[block], until_s)
        except (ResplitError, KeyError, asyncio.CancelledError):
            self._drop_unwanted()
            raise
        return missing

    async def _load_in_turn(self, executor: Executor, block: int, shard: WrappedShard, until_s: float) -> None:
        """Load a block once no other one is being loaded: a stand-by block may be, and its registry may hang."""
        key = self._unwrap(shard.key, shard.name)
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                await self._loading.acquire()
        except TimeoutError:
            raise ShardError(
                f"block {block} could not be loaded in time; {self.name} still loads another one"
            ) from None
        try:
            load = partial(self._load_shard, executor, block, shard, key, until_s)
            await to_its_end(asyncio.get_running_loop().run_in_executor(self._loader, load))
        finally:
            self._loading.release()

    def _load_shard(self, executor: Executor, block: int, shard: WrappedShard, key: bytes, until_s: float) -> None:
        sealed = self._shards.get(shard.name, shard.sealed_bytes, max(0.0, until_s - time.monotonic()))
        executor.load(block, open_shard(sealed, key))

    def _drop_unwanted(self, keep: tuple[int, ...] = (), drop: Callable[[int], None] | None = None) -> list[int]:
        """Call `drop` (by default: free weights and caches) for all blocks that no epoch needs, except `keep`.

        Those that should stand by keep their weights.
        """
        executor = self.executor
        if executor is None:
            return []
        routes = [*self.routes.values(), *self.prepared.values()]
        wanted = {block for route in routes for block in route.blocks_of(self.name)} | set(keep)
        unwanted = sorted((self._cleared | set(executor.memory.hosted)) - wanted)
        self._cleared = executor.memory.expected = frozenset()
        for block in unwanted:
            if block in executor.engine.blocks and self.standby.wants(block):
                executor.memory.retire(block)
                if drop is None:
                    executor.engine.drop_caches(block)
            else:
                (drop or executor.engine.drop)(block)
        return unwanted


async def _until_ended(executor: Executor) -> None:
    """A node whose executor ended because of a defect computes nothing more: its process must end too."""
    await asyncio.shield(asyncio.wrap_future(executor.ended))
