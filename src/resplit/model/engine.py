"""The torch engine: holds blocks and the key/value caches of sessions, runs segments, moves caches.

Everything outside speaks bytes, names and numbers: no torch type crosses this border. It owns no clock and no socket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from transformers import AutoConfig

from resplit.errors import CapacityError, DataError
from resplit.model.blocks import BlockModule, Chain, Split, features
from resplit.types import BlockFeatures, Sampling

_MOST_DIMENSIONS = 4  # a part of a cache
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Activation:
    """A tensor between nodes: `data` holds `shape` items of `dtype`, row by row, bit for bit."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class ModelSpec:
    """What a node must know of the model to run blocks of it: its Hugging Face config, dtype and granularity."""

    config: dict[str, Any]
    dtype: str
    split: Split

    def chain(self) -> Chain:
        """The chain of blocks that this describes."""
        plain = dict(self.config)
        return Chain(AutoConfig.for_model(plain.pop("model_type"), **plain), self.split)


class BlockCache:
    """Keys and values of one session in one block: (1, heads, length, width) each, growing up to `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._pair: torch.Tensor | None = None  # (2, heads, capacity, width)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (1, heads, tokens, width) of each; all keys and all values come back."""
        self.append(torch.stack((keys[0], values[0])))
        assert self._pair is not None
        held = self._pair[:, :, : self.length]
        return held[0].unsqueeze(0), held[1].unsqueeze(0)

    def crop(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.length = min(self.length, length)

    def part(self, first: int, last: int) -> torch.Tensor:
        """Positions `first..last-1`, (2, heads, last - first, width)."""
        assert self._pair is not None
        return self._pair[:, :, first:last]

    def ensure_room(self, end: int) -> None:
        """CapacityError where it may not grow to `end` positions."""
        if end > self.capacity:
            raise CapacityError(f"a session's cache is full: {end} tokens, room for {self.capacity}")

    def append(self, pair: torch.Tensor) -> None:
        """Append (2, heads, tokens, width); CapacityError where it does not fit."""
        end = self.length + pair.shape[2]
        self.ensure_room(end)
        if self._pair is None:
            self._pair = torch.empty((2, pair.shape[1], self.capacity, pair.shape[3]), dtype=pair.dtype)
        self._pair[:, :, self.length : end] = pair
        self.length = end


class TorchEngine:
    """Blocks and caches of one node.

    One thread runs passes and drops things. Beside it others may build blocks, and export or import the cache of a
    session while no pass of that session runs.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.dtype = DTYPES[spec.dtype]
        self.chain = spec.chain()
        self.kinds = tuple(block.kind for block in self.chain.specs)
        self.features: tuple[BlockFeatures, ...] = features(self.chain, self.dtype, 0)
        self._blocks: dict[int, BlockModule] = {}
        self._caches: dict[tuple[str, int], BlockCache] = {}

    @property
    def held_bytes(self) -> float:
        """Weights of the loaded blocks, and caches at the capacity that they may grow to."""
        weights = float(sum(block.weight_bytes for block in self._blocks.values()))
        return weights + sum(size for _, _, size in self.caches())

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the loaded blocks, in order."""
        return tuple(sorted(self._blocks))

    def load(self, block: int, tensors: bytes) -> None:
        """Load a block from safetensors bytes; ModelError where they are not this block's."""
        held = {name: tensor.to(self.dtype) for name, tensor in load(tensors).items()}
        self._blocks[block] = self.chain.materialise(block, held)

    def unload(self, block: int) -> None:
        """Free a block's weights; the sessions' caches of it stay."""
        self._blocks.pop(block, None)

    def drop(self, block: int) -> None:
        """Free a block and every session's cache of it."""
        self.unload(block)
        for key in [key for key in list(self._caches) if key[1] == block]:
            self._caches.pop(key, None)

    def missing_cache_bytes(self, session: str, first: int, last: int, capacity: int) -> float:
        """Bytes that caches of `session` in blocks `first..last` would add to what is held.

        DataError where the model has no such block.
        """
        if last >= len(self.features):
            raise DataError(f"block {last}: the model has {len(self.features)}")
        absent = [b for b in range(first, last + 1) if (session, b) not in self._caches]
        return float(sum(self.features[b].kv_bytes_per_token * capacity for b in absent))

    @torch.inference_mode()
    def run(
        self,
        session: str,
        first: int,
        last: int,
        start: int,
        capacity: int,
        given: Activation,
        after_block: Callable[[int], None] = lambda block: None,
    ) -> Activation:
        """Run blocks `first..last` for the positions from `start`; caches past `start` are cut back first.

        `given` holds token ids (1, tokens) where `first` is the embedding, else hidden states (1, tokens, width). After
        the head the result is the logits (1, vocabulary). DataError where the shape, the dtype or the positions do not
        fit what is held; CapacityError where the session's cache is full.
        """
        hidden = self._tensor(given, first)
        shared = None
        for index in range(first, last + 1):
            block = self._block(index)
            if shared is None:
                like = torch.empty((), dtype=self.dtype)
                shared = self.chain.prepare_pass(start, hidden.shape[1], like)
            end = start + hidden.shape[1]
            cache = self._cache(session, index, start, end, capacity) if block.has_cache else None
            hidden = block(hidden, shared, cache)
            after_block(index)
        return _activation(hidden)

    def sample(self, logits: Activation, sampling: Sampling, position: int) -> int:
        """The next token for the logits at `position`; DataError where they, or `sampling`, leave none to choose."""
        values = _to_tensor(logits)[0].float()
        if values.isnan().any():
            raise DataError("the logits are not numbers: what came from the node before this one was none either")
        if sampling.temperature <= 0:
            return int(values.argmax())
        probabilities = torch.softmax(values / sampling.temperature, dim=-1)
        if probabilities.isnan().any() or not sampling.top_p > 0:
            raise DataError(f"nothing can be drawn with temperature {sampling.temperature} and top_p {sampling.top_p}")
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0.0
        # One generator for each position: a replayed or migrated session draws what it would have drawn.
        generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + position) % 2**63)
        return int(order[torch.multinomial(ordered, 1, generator=generator)])

    def blank(self, tokens: int) -> Activation:
        """Hidden states of zeros, (1, tokens, width), for timing a block."""
        return _activation(torch.zeros((1, tokens, self.chain.config.hidden_size), dtype=self.dtype))

    def close(self, session: str, blocks: Collection[int] | None = None) -> None:
        """Free a session's caches, all of them or those of `blocks`."""
        for key in [key for key in list(self._caches) if key[0] == session and (blocks is None or key[1] in blocks)]:
            self._caches.pop(key, None)

    def sessions(self) -> set[str]:
        """Sessions that hold a cache here."""
        return {session for session, _ in list(self._caches)}

    def has_cache(self, block: int) -> bool:
        """Whether a block keeps keys and values."""
        return self.features[block].kv_bytes_per_token > 0

    def caches(self) -> list[tuple[str, int, float]]:
        """Session, block and bytes (at the capacity that it may grow to) of every cache, the oldest first."""
        return [
            (session, block, self.features[block].kv_bytes_per_token * cache.capacity)
            for (session, block), cache in list(self._caches.items())
        ]

    def lengths(self, session: str) -> dict[int, int]:
        """Positions held of a session, by block."""
        return {block: cache.length for (name, block), cache in list(self._caches.items()) if name == session}

    def capacity(self, session: str, block: int) -> int:
        """To how many positions the cache of `session` in `block` may grow; DataError where there is none."""
        return self._held_cache(session, block).capacity

    @torch.inference_mode()
    def export_cache(self, session: str, block: int, first: int, last: int) -> Activation:
        """Positions `first..last-1` of a session's cache of one block, (2, heads, positions, width).

        DataError where fewer are held.
        """
        cache = self._held_cache(session, block)
        if not 0 <= first < last <= cache.length:
            raise DataError(f"cache of block {block}: {cache.length} positions held, {first}..{last - 1} asked for")
        return _activation(cache.part(first, last))

    @torch.inference_mode()
    def import_cache(self, session: str, block: int, first: int, capacity: int, part: Activation) -> None:
        """Put a part of a cache at position `first`; a part that comes late, all of which is held already, is ignored.

        DataError where it leaves a hole or has another shape than the block's cache.
        """
        pair = _to_tensor(part)
        self._check_cache(block, pair)
        cache = self._caches.get((session, block)) or BlockCache(capacity)
        if cache.length < first:
            raise DataError(f"cache of block {block}: {cache.length} positions held, the part begins at {first}")
        if first + pair.shape[2] <= cache.length:
            return
        cache.ensure_room(first + pair.shape[2])
        cache.crop(first)
        cache.append(pair)
        self._caches[session, block] = cache  # only now: one that was refused must hold no memory

    def _block(self, index: int) -> BlockModule:
        try:
            return self._blocks[index]
        except KeyError:
            raise DataError(f"block {index} is not loaded here") from None

    def _held_cache(self, session: str, block: int) -> BlockCache:
        try:
            return self._caches[session, block]
        except KeyError:
            raise DataError(f"block {block} holds no cache of session {session}") from None

    def _cache(self, session: str, block: int, start: int, end: int, capacity: int) -> BlockCache:
        cache = self._caches.get((session, block)) or BlockCache(capacity)
        if cache.length < start:
            raise DataError(f"block {block} has {cache.length} positions of this session, the step begins at {start}")
        cache.ensure_room(end)
        cache.crop(start)
        self._caches[session, block] = cache  # only now: one that was refused must hold no memory
        return cache

    def _check_cache(self, block: int, pair: torch.Tensor) -> None:
        config = self.chain.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        fits = pair.dim() == 4 and (pair.shape[0], pair.shape[1], pair.shape[3]) == (2, heads, width)
        if not (fits and pair.dtype == self.dtype and 0 <= block < len(self.kinds) and self.has_cache(block)):
            raise DataError(f"block {block} was given a cache of {pair.dtype} {tuple(pair.shape)}")

    def _tensor(self, given: Activation, first: int) -> torch.Tensor:
        tensor = _to_tensor(given)
        width = self.chain.config.hidden_size
        if self.kinds[first] == "embed":
            fits = tensor.dtype == torch.int64 and tensor.dim() == 2
            if fits and not ((tensor >= 0) & (tensor < self.chain.config.vocab_size)).all():
                raise DataError("a token id outside of the vocabulary")
        else:
            fits = tensor.dtype == self.dtype and tensor.dim() == 3 and tensor.shape[2] == width
        if not fits or tensor.shape[0] != 1 or tensor.shape[1] < 1:
            raise DataError(f"block {first} was given {given.dtype} {given.shape}")
        return tensor


def token_ids(ids: list[int] | tuple[int, ...]) -> Activation:
    """Token ids as the embedding takes them, (1, tokens)."""
    return Activation("int64", (1, len(ids)), np.asarray(ids, dtype=np.int64).tobytes())


def _activation(tensor: torch.Tensor) -> Activation:
    flat = tensor.contiguous()
    data = flat.view(torch.uint8).numpy().tobytes()
    return Activation(str(flat.dtype).removeprefix("torch."), tuple(flat.shape), data)


def _to_tensor(activation: Activation) -> torch.Tensor:
    dtype = {**DTYPES, "int64": torch.int64}.get(activation.dtype)
    if dtype is None:
        raise DataError(f"unknown dtype {activation.dtype[:20]!r}")
    shape = activation.shape
    right = 1 <= len(shape) <= _MOST_DIMENSIONS and min(shape) > 0
    # Counted in Python's own integers: in 64 bits a huge shape may come out as a small one.
    if not right or math.prod(shape) * dtype.itemsize != len(activation.data):
        raise DataError(f"{len(activation.data)} bytes are not {activation.dtype} {shape[:_MOST_DIMENSIONS]}")
    return torch.frombuffer(bytearray(activation.data), dtype=dtype).reshape(activation.shape)
