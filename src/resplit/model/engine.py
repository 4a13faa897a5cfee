"""The torch engine: holds blocks and the key/value caches of sessions, and runs segments.

No torch type leaves this module: callers see bytes, names and numbers.
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

_MAX_DIMENSIONS = 4  # a part of a cache has most
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Activation:
    """A tensor as it travels between nodes: `data` is the items of `dtype` in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class ModelSpec:
    """A model without its weights: the Hugging Face config, the dtype, and whether a block is a layer or a sublayer."""

    config: dict[str, Any]
    dtype: str
    split: Split

    def chain(self) -> Chain:
        """The chain of blocks of this model."""
        plain = dict(self.config)
        return Chain(AutoConfig.for_model(plain.pop("model_type"), **plain), self.split)


class BlockCache:
    """Keys and values of one session in one block, (1, heads, length, width) each; `length` may grow to `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._pair: torch.Tensor | None = None  # (2, heads, capacity, width)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (1, heads, tokens, width) of each; returns all keys and all values, (1, heads, length, width)."""
        self.append(torch.stack((keys[0], values[0])))
        assert self._pair is not None
        held = self._pair[:, :, : self.length]
        return held[0].unsqueeze(0), held[1].unsqueeze(0)

    def crop(self, length: int) -> None:
        """Discard the positions from `length` on."""
        self.length = min(self.length, length)

    def part(self, first: int, last: int) -> torch.Tensor:
        """Keys and values at positions `first..last-1`, (2, heads, last - first, width)."""
        assert self._pair is not None
        return self._pair[:, :, first:last]

    def ensure_room(self, end: int) -> None:
        """CapacityError if the cache cannot grow to `end` positions."""
        if end > self.capacity:
            raise CapacityError(f"a session's cache is full: {end} tokens, room for {self.capacity}")

    def append(self, pair: torch.Tensor) -> None:
        """Append (2, heads, tokens, width); CapacityError if the capacity is exceeded."""
        end = self.length + pair.shape[2]
        self.ensure_room(end)
        if self._pair is None:
            self._pair = torch.empty((2, pair.shape[1], self.capacity, pair.shape[3]), dtype=pair.dtype)
        self._pair[:, :, self.length : end] = pair
        self.length = end


class TorchEngine:
    """Blocks and caches of one node.

    One thread runs passes. Other threads may at the same time load and drop blocks, and export or import caches of
    sessions that have no running pass.
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
        """Bytes of the loaded weights, and of the caches at their full capacity."""
        weights = float(sum(block.weight_bytes for block in self._blocks.values()))
        return weights + sum(size for _, _, size in self.caches())

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the loaded blocks, in order."""
        return tuple(sorted(self._blocks))

    def load(self, block: int, tensors: bytes) -> None:
        """Load a block from safetensors bytes; ModelError if they belong to another block."""
        held = {name: tensor.to(self.dtype) for name, tensor in load(tensors).items()}
        self._blocks[block] = self.chain.materialise(block, held)

    def unload(self, block: int) -> None:
        """Free a block's weights; the caches of its sessions stay."""
        self._blocks.pop(block, None)

    def drop(self, block: int) -> None:
        """Free a block and all its caches."""
        self.unload(block)
        for key in [key for key in list(self._caches) if key[1] == block]:
            self._caches.pop(key, None)

    def missing_cache_bytes(self, session: str, first: int, last: int, capacity: int) -> float:
        """Bytes that new caches of `session` in blocks `first..last` would need beside those that exist.

        DataError if the model has no such block.
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
        """Run blocks `first..last` for the positions from `start`; later positions in their caches are discarded.

        `given` is token ids (1, tokens) if `first` is the embedding, else hidden states (1, tokens, width). The result
        is hidden states, or the logits (1, vocabulary) if `last` is the head. `after_block` is called after each block
        with its index. DataError if shape, dtype or positions of `given` do not match the block and its cache;
        CapacityError if the session's cache is full.
        """
        hidden = self._tensor(given, first)
        context = None
        for index in range(first, last + 1):
            block = self._block(index)
            if context is None:
                like = torch.empty((), dtype=self.dtype)
                context = self.chain.prepare_pass(start, hidden.shape[1], like)
            end = start + hidden.shape[1]
            cache = self._cache(session, index, start, end, capacity) if block.has_cache else None
            hidden = block(hidden, context, cache)
            after_block(index)
        return _activation(hidden)

    def sample(self, logits: Activation, sampling: Sampling, position: int) -> int:
        """Draw the next token from `logits`, which were computed at `position`.

        DataError if the logits are NaN or `sampling` gives every token the probability 0.
        """
        values = _to_tensor(logits)[0].float()
        if values.isnan().any():
            raise DataError("the logits are NaN, as were the hidden states that this node received")
        if sampling.temperature <= 0:
            return int(values.argmax())
        probabilities = torch.softmax(values / sampling.temperature, dim=-1)
        if probabilities.isnan().any() or not sampling.top_p > 0:
            raise DataError(f"no token can be drawn with temperature {sampling.temperature} and top_p {sampling.top_p}")
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0.0
        # The generator depends on seed and position alone: a repeated or moved session draws the same tokens.
        generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + position) % 2**63)
        return int(order[torch.multinomial(ordered, 1, generator=generator)])

    def blank_input(self, block: int, tokens: int) -> Activation:
        """A valid input of a block, all zeros: the time of a pass does not depend on the values."""
        if self.kinds[block] == "embed":
            return token_ids([0] * tokens)
        return _activation(torch.zeros((1, tokens, self.chain.config.hidden_size), dtype=self.dtype))

    def close(self, session: str, blocks: Collection[int] | None = None) -> None:
        """Free all caches of a session, or those in `blocks`."""
        for key in [key for key in list(self._caches) if key[0] == session and (blocks is None or key[1] in blocks)]:
            self._caches.pop(key, None)

    def sessions(self) -> set[str]:
        """Sessions that have a cache here."""
        return {session for session, _ in list(self._caches)}

    def has_cache(self, block: int) -> bool:
        """Whether a block caches keys and values."""
        return self.features[block].kv_bytes_per_token > 0

    def caches(self) -> list[tuple[str, int, float]]:
        """Session, block and bytes (at full capacity) of every cache, oldest first."""
        return [
            (session, block, self.features[block].kv_bytes_per_token * cache.capacity)
            for (session, block), cache in list(self._caches.items())
        ]

    def lengths(self, session: str) -> dict[int, int]:
        """Cached positions of a session, by block."""
        return {block: cache.length for (name, block), cache in list(self._caches.items()) if name == session}

    def capacity(self, session: str, block: int) -> int:
        """The capacity in tokens of the cache of `session` in `block`; DataError if there is none."""
        return self._held_cache(session, block).capacity

    @torch.inference_mode()
    def export_cache(self, session: str, block: int, first: int, last: int) -> Activation:
        """Positions `first..last-1` of a session's cache of one block, (2, heads, positions, width).

        DataError if not all of them are cached.
        """
        cache = self._held_cache(session, block)
        if not 0 <= first < last <= cache.length:
            raise DataError(f"cache of block {block}: {cache.length} positions held, {first}..{last - 1} requested")
        return _activation(cache.part(first, last))

    @torch.inference_mode()
    def import_cache(self, session: str, block: int, first: int, capacity: int, part: Activation) -> None:
        """Store a part of a cache from position `first` on; a late part with only cached positions is ignored.

        DataError if the part begins after the cached positions, or has another shape than the block's caches.
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
        self._caches[session, block] = cache  # not before: a refused cache must hold no memory

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
        self._caches[session, block] = cache  # not before: a refused cache must hold no memory
        return cache

    def _check_cache(self, block: int, pair: torch.Tensor) -> None:
        heads, width = self.chain.cache_shape
        fits = pair.dim() == 4 and (pair.shape[0], pair.shape[1], pair.shape[3]) == (2, heads, width)
        if not (fits and pair.dtype == self.dtype and 0 <= block < len(self.kinds) and self.has_cache(block)):
            raise DataError(f"block {block} was given a cache of {pair.dtype} {tuple(pair.shape)}")

    def _tensor(self, given: Activation, first: int) -> torch.Tensor:
        tensor = _to_tensor(given)
        width = self.chain.config.hidden_size
        if self.kinds[first] == "embed":
            fits = tensor.dtype == torch.int64 and tensor.dim() == 2
            if fits and not ((tensor >= 0) & (tensor < self.chain.config.vocab_size)).all():
                raise DataError("a token id is outside the vocabulary")
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
    is_valid = 1 <= len(shape) <= _MAX_DIMENSIONS and min(shape) > 0
    # Computed with Python's integers: 64-bit products of huge shapes can overflow to small numbers.
    if not is_valid or math.prod(shape) * dtype.itemsize != len(activation.data):
        raise DataError(f"{len(activation.data)} bytes are not {activation.dtype} {shape[:_MAX_DIMENSIONS]}")
    return torch.frombuffer(bytearray(activation.data), dtype=dtype).reshape(activation.shape)
