"""The blocks of the ONNX engine: which graphs each kind of block runs, on which buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from resplit.model.activation import Activation, of_array
from resplit.model.engines.base import CHUNK_TOKENS, SessionCache, SessionRows
from resplit.model.engines.onnx.contents import ATTENTION_SLOTS
from resplit.model.engines.onnx.runtime import Array, Bound, Runtime
from resplit.model.spec import ModelSpec

Arrays = dict[str, Array]
_SLOTS = sorted(ATTENTION_SLOTS, reverse=True)


class OnnxCache(SessionCache):
    """Keys and values of one session in one block, (1, heads, capacity, width) each: graphs write to them in place.

    The system gives the memory as positions are written.
    """

    def __init__(self, heads: int, width: int, capacity: int) -> None:
        super().__init__(capacity)
        self.keys = np.zeros((1, heads, capacity, width), dtype=np.float32)
        self.values = np.zeros((1, heads, capacity, width), dtype=np.float32)
        self.addresses = (self.keys.ctypes.data, self.values.ctypes.data, capacity)

    def read(self, first: int, last: int) -> Activation:
        """Keys and values at positions `first..last-1`, (2, heads, positions, width)."""
        return of_array(np.concatenate((self.keys[:, :, first:last], self.values[:, :, first:last])))

    def append(self, part: Activation) -> None:
        """Append keys and values, (2, heads, positions, width)."""
        pair = np.frombuffer(part.data, dtype=np.float32).reshape(part.shape)
        end = self.length + part.shape[2]
        self.keys[0, :, self.length : end], self.values[0, :, self.length : end] = pair
        self.length = end


@dataclass(frozen=True)
class PlacedRows:
    """The rows of one session, in the buffers from `row` on, with the session's caches by block."""

    rows: SessionRows
    row: int
    caches: dict[int, OnnxCache]

    @property
    def end_row(self) -> int:
        """The row after the last one."""
        return self.row + self.rows.tokens


class Buffers:
    """The memory on which graphs run: one line for each row of a pass, grown as passes need it."""

    def __init__(self, spec: ModelSpec) -> None:
        self._widths = {
            "hidden": spec.hidden_size,
            "output": spec.hidden_size,
            "qkv": (spec.heads + 2 * spec.kv_heads) * spec.head_width,
            "attended": spec.heads * spec.head_width,
        }
        self._vocabulary = spec.vocabulary
        self._arrays: dict[str, Array] = {}
        self._addresses: dict[str, int] = {}
        self._room = 0
        self.rows = 0  # of the current pass
        self.answers = 0  # rows of the current pass whose logits are wanted
        self.generation = 0  # changes when addresses change

    def begin(self, rows: int) -> None:
        """Make room for a pass of so many rows."""
        self.rows = rows
        if rows > self._room:
            self._room = max(16, 1 << (rows - 1).bit_length())
            for name, width in self._widths.items():
                self._set(name, np.zeros((self._room, width), dtype=np.float32))
            self._set("tokens", np.zeros(self._room, dtype=np.int64))
            self._set("last", np.zeros(self._room, dtype=np.int32))
            self._set("total", np.zeros(self._room, dtype=np.int32))
            self.generation += 1

    def begin_answers(self, rows: int) -> None:
        """Make room for so many rows of logits."""
        self.answers = rows
        if "logits" not in self._arrays or rows > len(self._arrays["logits"]):
            self._set("logits", np.zeros((max(16, rows), self._vocabulary), dtype=np.float32))
            self.generation += 1

    def ensure_rotary(self, frequencies: Array, positions: int) -> None:
        """Make the table of rotary positions long enough. `frequencies` are inverse frequencies, and a scale last."""
        if "cos" not in self._arrays or len(self._arrays["cos"]) < positions:
            length = 1 << max(8, (positions - 1).bit_length())
            # The angles are rounded to float32 as transformers rounds them.
            angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :-1]  # (positions, width / 2)
            for name, function in (("cos", np.cos), ("sin", np.sin)):
                self._set(name, (function(angles.astype(np.float64)) * frequencies[-1]).astype(np.float32))
            self.generation += 1

    def array(self, name: str) -> Array:
        """The rows of one buffer in the current pass."""
        return self._arrays[name][: self.answers if name == "logits" else self.rows]

    def bound(self, name: str, row: int = 0, shape: tuple[int, ...] | None = None, alias: str = "") -> Bound:
        """The rows of a buffer from `row` on, as a graph binds them under the name `alias`."""
        array = self._arrays[name]
        shape = (self.array(name).shape) if shape is None else shape
        return alias or name, array.dtype.type, shape, self._addresses[name] + row * array.strides[0]

    def table(self, name: str) -> Bound:
        """The whole rotary table."""
        return name, np.float32, self._arrays[name].shape, self._addresses[name]

    def _set(self, name: str, array: Array) -> None:
        self._arrays[name] = array
        self._addresses[name] = array.ctypes.data


class Block(Protocol):
    """One loaded block; it computes the rows of a pass in place."""

    def run(self, index: int, buffers: Buffers, batch: Sequence[PlacedRows]) -> None:
        """Compute block number `index` for all rows of the pass."""
        ...


class Embedding:
    """Token ids to hidden states."""

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._graph = runtime.graph(arrays["embed"])

    def run(self, index: int, buffers: Buffers, batch: Sequence[PlacedRows]) -> None:
        """Compute the block for all rows of the pass."""
        self._graph.run(
            (buffers.generation, buffers.rows), lambda: ([buffers.bound("tokens")], [buffers.bound("hidden")])
        )


class Products:
    """A block without caches: `graph` maps hidden states to hidden states (mlp)."""

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._graph = runtime.graph(arrays["mlp"])

    def run(self, index: int, buffers: Buffers, batch: Sequence[PlacedRows]) -> None:
        """Compute the block for all rows of the pass."""
        self._graph.run(
            (buffers.generation, buffers.rows), lambda: ([buffers.bound("hidden")], [buffers.bound("output")])
        )
        buffers.array("hidden")[:] = buffers.array("output")


class Layer:
    """A layer, or the attention half of one: products over all rows, attention for each session."""

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._before = runtime.graph(arrays["before"])
        self._after = runtime.graph(arrays["after"])
        self._attention = {slots: runtime.shared_graph(arrays[f"attention.{slots}"]) for slots in ATTENTION_SLOTS}
        self._rotary = arrays["rotary"]

    def run(self, index: int, buffers: Buffers, batch: Sequence[PlacedRows]) -> None:
        """Compute the block for all rows of the pass, and extend the sessions' caches by them."""
        buffers.ensure_rotary(self._rotary, max(each.rows.end for each in batch))
        key = buffers.generation, buffers.rows
        self._before.run(key, lambda: ([buffers.bound("hidden")], [buffers.bound("qkv")]))
        self._attend(index, buffers, batch)
        inputs = "hidden", "attended"
        self._after.run(key, lambda: (map(buffers.bound, inputs), [buffers.bound("output")]))
        buffers.array("hidden")[:] = buffers.array("output")
        for each in batch:
            each.caches[index].length = each.rows.end

    def _attend(self, index: int, buffers: Buffers, batch: Sequence[PlacedRows]) -> None:
        """Single rows share a graph; several positions of one session run in pieces."""
        singles = [each for each in batch if each.rows.tokens == 1]  # they come first, in the rows 0, 1, ...
        row = 0
        while row < len(singles):
            slots = next(slots for slots in _SLOTS if slots <= len(singles) - row)
            self._run_attention(buffers, row, 1, [each.caches[index] for each in singles[row : row + slots]])
            row += slots
        for each in batch[len(singles) :]:
            for first, last in _pieces(each.rows):
                first_row = each.row + first - each.rows.start
                self._run_attention(buffers, first_row, last - first, [each.caches[index]])

    def _run_attention(self, buffers: Buffers, row: int, positions: int, caches: Sequence[OnnxCache]) -> None:
        key = buffers.generation, row, positions, *(cache.addresses for cache in caches)
        self._attention[len(caches)].run(key, lambda: _attention_memory(buffers, row, positions, caches))


class Head:
    """Hidden states to logits, for the rows that want them."""

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._graph = runtime.graph(arrays["head"])

    def run(self, index: int, buffers: Buffers, batch: Sequence[PlacedRows]) -> None:
        """Compute the logits of every session's last row, and of its drafts."""
        wanted = [row for each in batch for row in range(each.end_row - each.rows.answers, each.end_row)]
        buffers.begin_answers(len(wanted))
        if not wanted:
            return
        hidden = buffers.array("hidden")
        if len(wanted) < len(hidden):
            hidden[: len(wanted)] = hidden[wanted]
        shape = len(wanted), hidden.shape[1]
        key = buffers.generation, len(wanted)
        self._graph.run(key, lambda: ([buffers.bound("hidden", shape=shape)], [buffers.bound("logits")]))


BLOCKS: dict[str, Any] = {"embed": Embedding, "layer": Layer, "attention": Layer, "mlp": Products, "head": Head}


def _pieces(rows: SessionRows) -> Iterator[tuple[int, int]]:
    """The ranges of positions that attention computes together: one by one if stepwise, else `CHUNK_TOKENS`.

    They end at multiples of `CHUNK_TOKENS`, because the bits of a position depend on the piece that it is in.
    """
    first = rows.start
    while first < rows.end:
        step = 1 if rows.stepwise else CHUNK_TOKENS - first % CHUNK_TOKENS
        yield first, min(first + step, rows.end)
        first += step


def _attention_memory(
    buffers: Buffers, row: int, positions: int, caches: Sequence[OnnxCache]
) -> tuple[list[Bound], list[Bound]]:
    slots = len(caches)
    qkv, attended = (
        buffers.bound(name, row, (slots, positions, buffers.array(name).shape[1])) for name in ("qkv", "attended")
    )
    inputs, outputs = [qkv, buffers.table("cos"), buffers.table("sin")], [attended]
    for slot, cache in enumerate(caches):
        last_row = row + (slot if slots > 1 else positions - 1)
        inputs += [buffers.bound(name, last_row, (1,), f"{name}{slot}") for name in ("last", "total")]
        for name, array, address in zip(("keys", "values"), (cache.keys, cache.values), cache.addresses, strict=False):
            inputs.append((f"{name}{slot}", np.float32, array.shape, address))
            outputs.append((f"new_{name}{slot}", np.float32, array.shape, address))
    return inputs, outputs
