"""The blocks of the ONNX engine: which graphs each kind of block runs, on which buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from resplit.model.activation import Activation, of_array
from resplit.model.engines.base import CHUNK_TOKENS, SessionCache, SessionRows
from resplit.model.engines.onnx.contents import ATTENTION_SLOTS
from resplit.model.engines.onnx.runtime import Array, Bound, Call, Runtime
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


@dataclass(frozen=True)
class Piece:
    """Rows that attention computes together, from `row` on: `positions` of one session, or one of each of several."""

    row: int
    positions: int
    sessions: tuple[PlacedRows, ...]


class PassRows:
    """All rows of a pass. Single rows come first, in the rows 0, 1, ..."""

    def __init__(self, placed: Sequence[PlacedRows]) -> None:
        self.placed = placed
        self.rows = placed[-1].end_row
        # Only attention turns rows by their positions, and caches bound these.
        self.positions = max((each.rows.end for each in placed if each.caches), default=0)
        self.answers = [row for each in placed for row in range(each.end_row - each.rows.answers, each.end_row)]
        self.pieces = tuple(_pieces(placed))

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two passes that compute the same rows on the same memory of caches, whatever the positions."""
        pieces = tuple((piece.row, piece.positions, len(piece.sessions)) for piece in self.pieces)
        sessions = tuple((each.end_row, *(cache.addresses for cache in each.caches.values())) for each in self.placed)
        return pieces, sessions, tuple(self.answers)


class Buffers:
    """The memory on which graphs run: one line for each row of a pass, grown as passes need it."""

    def __init__(self, spec: ModelSpec) -> None:
        self._widths = {
            "hidden": spec.hidden_size,
            "qkv": (spec.heads + 2 * spec.kv_heads) * spec.head_width,
            "attended": spec.heads * spec.head_width,
        }
        self._vocabulary = spec.vocabulary
        self._arrays: dict[str, Array] = {}
        self._addresses: dict[str, int] = {}
        self._room = 0
        self.frequencies: Array | None = None  # inverse frequencies of the rotary embedding, and a scale last
        self.rows = 0  # of the current pass
        self.answers = 0  # rows of the current pass whose logits are wanted
        self.generation = 0  # changes when addresses change

    def begin(self, rows: int, answers: int, positions: int) -> None:
        """Make room for a pass of so many rows, logits of so many, and a rotary table of so many positions."""
        self.rows, self.answers = rows, answers
        if rows > self._room:
            self._room = max(16, 1 << (rows - 1).bit_length())
            for name, width in self._widths.items():
                self._set(name, np.zeros((self._room, width), dtype=np.float32))
            self._set("tokens", np.zeros(self._room, dtype=np.int64))
            self._set("last", np.zeros(self._room, dtype=np.int32))
            self._set("total", np.zeros(self._room, dtype=np.int32))
        if answers > self._lines("logits") or "logits" not in self._arrays:  # the first pass may want none
            self._set("logits", np.zeros((max(16, answers), self._vocabulary), dtype=np.float32))
        if positions > self._lines("cos") and self.frequencies is not None:
            self._set_rotary(1 << max(8, (positions - 1).bit_length()), self.frequencies)

    def _lines(self, name: str) -> int:
        return len(self._arrays[name]) if name in self._arrays else 0

    def _set_rotary(self, positions: int, frequencies: Array) -> None:
        # The angles are rounded to float32 as transformers rounds them.
        angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None, :-1]  # (positions, width / 2)
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            self._set(name, (function(angles.astype(np.float64)) * frequencies[-1]).astype(np.float32))

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
        self.generation += 1


class OnnxBlock(Protocol):
    """One loaded block; it computes the rows of a pass in place."""

    def calls(self, index: int, buffers: Buffers, rows: PassRows) -> Iterable[Call]:
        """What computes block number `index` for all rows of a pass, in this order."""
        ...


class Embedding:
    """Token ids to hidden states."""

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._graph = runtime.graph(arrays["embed"])

    def calls(self, index: int, buffers: Buffers, rows: PassRows) -> Iterable[Call]:
        """What computes the block for all rows of a pass."""
        yield self._graph.call([buffers.bound("tokens")], [buffers.bound("hidden")])


class Products:
    """A block without caches: `graph` maps hidden states to hidden states (mlp)."""

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._graph = runtime.graph(arrays["mlp"])

    def calls(self, index: int, buffers: Buffers, rows: PassRows) -> Iterable[Call]:
        """What computes the block for all rows of a pass."""
        yield self._graph.call([buffers.bound("hidden")], [buffers.bound("hidden", alias="output")])


class Layer:
    """A layer, or the attention half of one: products over all rows, attention for each session.

    The last operation of `after` adds to the hidden states, so its output may take their memory.
    """

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._before = runtime.graph(arrays["before"])
        self._after = runtime.graph(arrays["after"])
        self._attention = {slots: runtime.shared_graph(arrays[f"attention.{slots}"]) for slots in ATTENTION_SLOTS}

    def calls(self, index: int, buffers: Buffers, rows: PassRows) -> Iterable[Call]:
        """What computes the block for all rows of a pass, and extends the sessions' caches by them."""
        hidden = buffers.bound("hidden")
        yield self._before.call([hidden], [buffers.bound("qkv")])
        for piece in rows.pieces:
            caches = [each.caches[index] for each in piece.sessions]
            yield self._attention[len(caches)].call(*_attention_memory(buffers, piece, caches))
        yield self._after.call([hidden, buffers.bound("attended")], [buffers.bound("hidden", alias="output")])


class Head:
    """Hidden states to logits, for the rows that want them."""

    def __init__(self, arrays: Arrays, runtime: Runtime) -> None:
        self._graph = runtime.graph(arrays["head"])

    def calls(self, index: int, buffers: Buffers, rows: PassRows) -> Iterable[Call]:
        """What computes the logits of every session's last row, and of its drafts."""
        hidden, wanted = buffers.array("hidden"), rows.answers
        if not wanted:
            return
        if len(wanted) < len(hidden):
            yield partial(_gather, hidden, wanted)
        shape = len(wanted), hidden.shape[1]
        yield self._graph.call([buffers.bound("hidden", shape=shape)], [buffers.bound("logits")])


BLOCKS: dict[str, Any] = {"embed": Embedding, "layer": Layer, "attention": Layer, "mlp": Products, "head": Head}


def _gather(rows: Array, wanted: list[int]) -> None:
    """Move the wanted rows to the front."""
    rows[: len(wanted)] = rows[wanted]


def _pieces(placed: Sequence[PlacedRows]) -> Iterator[Piece]:
    """Single rows share a graph; several positions of one session run in pieces."""
    singles = [each for each in placed if each.rows.tokens == 1]
    row = 0
    while row < len(singles):
        slots = next(slots for slots in _SLOTS if slots <= len(singles) - row)
        yield Piece(row, 1, tuple(singles[row : row + slots]))
        row += slots
    for each in placed[len(singles) :]:
        for first, last in _ranges(each.rows):
            yield Piece(each.row + first - each.rows.start, last - first, (each,))


def _ranges(rows: SessionRows) -> Iterator[tuple[int, int]]:
    """The ranges of positions that attention computes together: one by one if stepwise, else `CHUNK_TOKENS`.

    They end at multiples of `CHUNK_TOKENS`, because the bits of a position depend on the piece that it is in.
    """
    first = rows.start
    while first < rows.end:
        step = 1 if rows.stepwise else CHUNK_TOKENS - first % CHUNK_TOKENS
        yield first, min(first + step, rows.end)
        first += step


def _attention_memory(buffers: Buffers, piece: Piece, caches: Sequence[OnnxCache]) -> tuple[list[Bound], list[Bound]]:
    slots, row, positions = len(caches), piece.row, piece.positions
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
