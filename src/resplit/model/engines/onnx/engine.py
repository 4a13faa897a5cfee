"""The ONNX Runtime engine: runs the packaged graphs of blocks over a batch of sessions.

All rows of a pass share the products of a block. Attention runs for each session over its own cache, in place. So the
bits of a row depend on its session alone, whatever else is in the pass, and wherever the model is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from safetensors.numpy import load

from resplit.errors import DataError, ModelError, ResplitError
from resplit.model.activation import Activation, of_array
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.engines.onnx.blocks import BLOCKS, Buffers, OnnxBlock, OnnxCache, PassRows, PlacedRows
from resplit.model.engines.onnx.contents import expected_names
from resplit.model.engines.onnx.runtime import Call, Runtime
from resplit.model.spec import ModelSpec

# Prepared passes above this number are forgotten: batches change as sessions come and go.
_MOST_PREPARED = 32
# What computes the blocks of a segment, by block.
Prepared = list[tuple[int, list[Call]]]


class OnnxEngine(Engine[OnnxCache]):
    """Blocks and caches of one node, computed by ONNX Runtime. The first engine of a process sets its `threads`."""

    def __init__(self, spec: ModelSpec, threads: int = 1) -> None:
        super().__init__(spec)
        self._runtime = Runtime(threads)
        self._buffers = Buffers(spec)
        self._blocks: dict[int, OnnxBlock] = {}
        self._prepared: dict[Hashable, Prepared] = {}

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the loaded blocks, in order."""
        return tuple(sorted(self._blocks))

    def load(self, block: int, content: bytes) -> None:
        """Load a block from its packaged content; ModelError if that belongs to another block."""
        arrays, kind = load(content), self.kinds[block]
        if missing := expected_names(kind) - arrays.keys():
            raise ModelError(f"block {self.features[block].name}: its shard lacks {', '.join(sorted(missing))}")
        if "rotary" in arrays:
            self._buffers.frequencies = arrays["rotary"]  # the same for all layers
        self._blocks[block] = BLOCKS[kind](arrays, self._runtime)

    def unload(self, block: int) -> None:
        """Free a block's weights; the caches of its sessions stay."""
        self._blocks.pop(block, None)
        self._prepared = {}  # a pass that runs now keeps the old ones to itself: it may still add the freed block

    def run(
        self,
        first: int,
        last: int,
        batch: Sequence[SessionRows],
        after_block: Callable[[int], None] = lambda block: None,
    ) -> list[Activation | ResplitError]:
        """Run blocks `first..last` for all rows of `batch`, as `Engine.run` says."""
        prepared = self._prepared
        blocks = {index: self._loaded(index) for index in range(first, last + 1)}
        placed, results = self._place(first, last, batch)
        if placed:
            rows = PassRows(list(placed.values()))
            self._fill(first, last, rows)
            for index, calls in self._calls(blocks, rows, prepared):
                for call in calls:
                    call()
                after_block(index)
            for each in rows.placed:
                for cache in each.caches.values():
                    cache.length = each.rows.end
            results |= self._outputs(last, placed)
        return [results[index] for index in range(len(batch))]

    def _calls(self, blocks: dict[int, OnnxBlock], rows: PassRows, prepared: dict[Hashable, Prepared]) -> Prepared:
        """What computes a pass. Decode steps of the same sessions are prepared once."""
        key = (self._buffers.generation, *blocks.values(), *rows.key)
        if key not in prepared:
            if len(prepared) >= _MOST_PREPARED:
                prepared.clear()
            prepared[key] = [(index, list(block.calls(index, self._buffers, rows))) for index, block in blocks.items()]
        return prepared[key]

    def _place(
        self, first: int, last: int, batch: Sequence[SessionRows]
    ) -> tuple[dict[int, PlacedRows], dict[int, Activation | ResplitError]]:
        """Give each session of the batch its rows, single rows first; and the errors of those that cannot run."""
        placed: dict[int, PlacedRows] = {}
        errors: dict[int, Activation | ResplitError] = {}
        row = 0
        for index in sorted(range(len(batch)), key=lambda index: batch[index].tokens > 1):
            rows = batch[index]
            try:
                self.ensure_input(rows, first)
                caches = {b: self._cache_for(rows, b) for b in self._caching_from(first, last)}
            except ResplitError as error:
                errors[index] = error
                continue
            placed[index] = PlacedRows(rows, row, caches)
            row += rows.tokens
        return placed, errors

    def _fill(self, first: int, last: int, rows: PassRows) -> None:
        """Write the inputs of a pass into the buffers."""
        buffers = self._buffers
        buffers.begin(rows.rows, len(rows.answers) if self.kinds[last] == "head" else 0, rows.positions)
        name, dtype = ("tokens", np.int64) if self.kinds[first] == "embed" else ("hidden", np.float32)
        inputs, last_positions, total = (buffers.array(each) for each in (name, "last", "total"))
        for each in rows.placed:
            taken = slice(each.row, each.end_row)
            inputs[taken] = np.frombuffer(each.rows.values.data, dtype=dtype).reshape(inputs[taken].shape)
            last_positions[taken] = np.arange(each.rows.start, each.rows.end)
            total[taken] = last_positions[taken] + 1

    def _outputs(self, last: int, placed: dict[int, PlacedRows]) -> dict[int, Activation | ResplitError]:
        """The results of a pass, by place in the batch."""
        if self.kinds[last] != "head":
            hidden = self._buffers.array("hidden")
            return {index: of_array(hidden[None, each.row : each.end_row]) for index, each in placed.items()}
        logits, row = self._buffers.array("logits"), 0
        outputs: dict[int, Activation | ResplitError] = {}
        for index, each in placed.items():
            end = row + each.rows.answers
            outputs[index] = of_array(logits[row:end])
            row = end
        return outputs

    def _loaded(self, index: int) -> OnnxBlock:
        try:
            return self._blocks[index]
        except KeyError:
            raise DataError(f"block {index} is not loaded here") from None

    def _new_cache(self, block: int, capacity: int) -> OnnxCache:
        return OnnxCache(self.spec.kv_heads, self.spec.head_width, capacity)
