"""The ONNX Runtime engine: runs the packaged graphs of blocks over a batch of sessions.

All rows of a pass share the products of a block. Attention runs for each session over its own cache, in place. So the
bits of a row depend on its session alone, whatever else is in the pass, and wherever the model is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from safetensors.numpy import load

from resplit.errors import DataError, ModelError, ResplitError
from resplit.model.activation import Activation, of_array
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.engines.onnx.blocks import BLOCKS, Block, Buffers, OnnxCache, PlacedRows
from resplit.model.engines.onnx.contents import expected_names
from resplit.model.engines.onnx.runtime import Runtime
from resplit.model.spec import ModelSpec


class OnnxEngine(Engine[OnnxCache]):
    """Blocks and caches of one node, computed by ONNX Runtime. The first engine of a process sets its `threads`."""

    def __init__(self, spec: ModelSpec, threads: int = 1) -> None:
        super().__init__(spec)
        self._runtime = Runtime(threads)
        self._buffers = Buffers(spec)
        self._blocks: dict[int, Block] = {}

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the loaded blocks, in order."""
        return tuple(sorted(self._blocks))

    def load(self, block: int, content: bytes) -> None:
        """Load a block from its packaged content; ModelError if that belongs to another block."""
        arrays, kind = load(content), self.kinds[block]
        if missing := expected_names(kind) - arrays.keys():
            raise ModelError(f"block {self.features[block].name}: its shard lacks {', '.join(sorted(missing))}")
        self._blocks[block] = BLOCKS[kind](arrays, self._runtime)

    def unload(self, block: int) -> None:
        """Free a block's weights; the caches of its sessions stay."""
        self._blocks.pop(block, None)

    def run(
        self,
        first: int,
        last: int,
        batch: Sequence[SessionRows],
        after_block: Callable[[int], None] = lambda block: None,
    ) -> list[Activation | ResplitError]:
        """Run blocks `first..last` for all rows of `batch`, as `Engine.run` says."""
        blocks = {index: self._loaded(index) for index in range(first, last + 1)}
        placed, results = self._place(first, last, batch)
        if placed:
            self._fill(first, list(placed.values()))
            for index, block in blocks.items():
                block.run(index, self._buffers, list(placed.values()))
                after_block(index)
            results |= self._outputs(last, placed)
        return [results[index] for index in range(len(batch))]

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
                caches = {b: self._cache_for(rows, b) for b in range(first, last + 1) if self.has_cache(b)}
            except ResplitError as error:
                errors[index] = error
                continue
            placed[index] = PlacedRows(rows, row, caches)
            row += rows.tokens
        return placed, errors

    def _fill(self, first: int, batch: Sequence[PlacedRows]) -> None:
        """Write the inputs of a pass into the buffers."""
        buffers = self._buffers
        buffers.begin(batch[-1].end_row)
        name, dtype = ("tokens", np.int64) if self.kinds[first] == "embed" else ("hidden", np.float32)
        inputs, last, total = (buffers.array(each) for each in (name, "last", "total"))
        for each in batch:
            taken = slice(each.row, each.end_row)
            inputs[taken] = np.frombuffer(each.rows.values.data, dtype=dtype).reshape(inputs[taken].shape)
            last[taken] = np.arange(each.rows.start, each.rows.end)
            total[taken] = last[taken] + 1

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

    def _loaded(self, index: int) -> Block:
        try:
            return self._blocks[index]
        except KeyError:
            raise DataError(f"block {index} is not loaded here") from None

    def _new_cache(self, block: int, capacity: int) -> OnnxCache:
        return OnnxCache(self.spec.kv_heads, self.spec.head_width, capacity)
