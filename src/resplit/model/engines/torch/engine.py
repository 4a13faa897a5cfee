"""The torch engine: any supported Hugging Face decoder, in the dtypes of torch. It is the oracle of the other engines.

Rows of several sessions run one session after another. No torch type leaves this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load
from transformers import AutoConfig

from resplit.errors import DataError, ModelError, ResplitError
from resplit.model.activation import Activation
from resplit.model.engines.base import Engine, SessionCache, SessionRows
from resplit.model.engines.torch.blocks import BlockModule, Chain
from resplit.model.spec import ModelSpec
from resplit.types import Device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chain_of(config: dict[str, Any], split: str) -> Chain:
    """The chain of blocks of the model with this Hugging Face config; ModelError if it is not supported."""
    plain = dict(config)
    return Chain(AutoConfig.for_model(plain.pop("model_type"), **plain), "sublayer" if split == "sublayer" else "layer")


def available_device(device: Device) -> torch.device:
    """The device of this name, "auto" being the first of cuda, mps and cpu that is here; ModelError without it."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, is_here in here.items() if is_here))
    if not here[device]:
        raise ModelError(f"device {device}: torch finds none on this machine; set `device: cpu` or `device: auto`")
    return torch.device(device)


class TorchCache(SessionCache):
    """Keys and values of one session in one block, (1, heads, length, width) each, in the memory of `device`."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(capacity)
        self._device = device
        self._pair: torch.Tensor | None = None  # (2, heads, capacity, width)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (1, heads, tokens, width) of each; returns all keys and all values, (1, heads, length, width)."""
        self._append(torch.stack((keys[0], values[0])))
        assert self._pair is not None
        held = self._pair[:, :, : self.length]
        return held[0].unsqueeze(0), held[1].unsqueeze(0)

    @torch.inference_mode()
    def read(self, first: int, last: int) -> Activation:
        """Keys and values at positions `first..last-1`, (2, heads, positions, width)."""
        assert self._pair is not None
        return _activation(self._pair[:, :, first:last])

    @torch.inference_mode()
    def append(self, part: Activation) -> None:
        """Append keys and values, (2, heads, positions, width)."""
        self._append(_to_tensor(part, self._device))

    def _append(self, pair: torch.Tensor) -> None:
        end = self.length + pair.shape[2]
        if self._pair is None:
            shape = 2, pair.shape[1], self.capacity, pair.shape[3]
            self._pair = torch.empty(shape, dtype=pair.dtype, device=self._device)
        self._pair[:, :, self.length : end] = pair
        self.length = end


class TorchEngine(Engine[TorchCache]):
    """Blocks and caches of one node, computed by torch."""

    def __init__(self, spec: ModelSpec, threads: int = 1, device: Device = "auto") -> None:
        super().__init__(spec)
        torch.set_num_threads(threads)
        self.device = available_device(device)
        self.dtype = DTYPES[spec.weights]
        self.chain = chain_of(spec.config, spec.split).on(self.device)
        self._blocks: dict[int, BlockModule] = {}

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the loaded blocks, in order."""
        return tuple(sorted(self._blocks))

    def load(self, block: int, content: bytes) -> None:
        """Load a block from safetensors bytes; ModelError if they belong to another block."""
        held = {name: tensor.to(self.device, self.dtype) for name, tensor in load(content).items()}
        self._blocks[block] = self.chain.materialise(block, held)

    def unload(self, block: int) -> None:
        """Free a block's weights; the caches of its sessions stay."""
        self._blocks.pop(block, None)

    @torch.inference_mode()
    def run(
        self,
        first: int,
        last: int,
        batch: Sequence[SessionRows],
        after_block: Callable[[int], None] = lambda block: None,
    ) -> list[Activation | ResplitError]:
        """Run blocks `first..last` for all rows of `batch`, as `Engine.run` says."""
        blocks = {index: self._loaded(index) for index in range(first, last + 1)}
        results: list[Activation | ResplitError] = [DataError("not computed")] * len(batch)
        hidden: dict[int, torch.Tensor] = {}
        for place, rows in enumerate(batch):
            try:
                self.ensure_input(rows, first)
                for index in filter(self.has_cache, blocks):
                    self._cache_for(rows, index)
                hidden[place] = _to_tensor(rows.values, self.device)
            except ResplitError as error:
                results[place] = error
        for index, block in blocks.items():
            for place in hidden:
                hidden[place] = self._compute(block, index, batch[place], hidden[place])
            after_block(index)
        for place, tensor in hidden.items():
            results[place] = _activation(tensor)
        return results

    def _compute(self, block: BlockModule, index: int, rows: SessionRows, hidden: torch.Tensor) -> torch.Tensor:
        """One block for the rows of one session: one pass, or one for each position if they are stepwise."""
        start, is_head = rows.start, self.kinds[index] == "head"
        if is_head:
            if not rows.answers:
                return hidden.new_empty((0, self.spec.vocabulary))
            start = rows.end - rows.answers
            hidden = hidden[:, -rows.answers :]  # (1, answers, width)
        parts = torch.split(hidden, 1, dim=1) if rows.stepwise or is_head else (hidden,)
        outputs = []
        for part in parts:
            context = self.chain.prepare_pass(
                start, part.shape[1], torch.empty((), dtype=self.dtype, device=self.device)
            )
            outputs.append(block(part, context, self._caches.get((rows.session, index))))
            start += part.shape[1]
        return torch.cat(outputs, dim=0 if is_head else 1)

    def _loaded(self, index: int) -> BlockModule:
        try:
            return self._blocks[index]
        except KeyError:
            raise DataError(f"block {index} is not loaded here") from None

    def _new_cache(self, block: int, capacity: int) -> TorchCache:
        return TorchCache(capacity, self.device)


def _activation(tensor: torch.Tensor) -> Activation:
    flat = tensor.cpu().contiguous()
    data = flat.view(torch.uint8).numpy().tobytes()
    return Activation(str(flat.dtype).removeprefix("torch."), tuple(flat.shape), data)


def _to_tensor(activation: Activation, device: torch.device) -> torch.Tensor:
    dtype = {**DTYPES, "int64": torch.int64}[activation.dtype]
    return torch.frombuffer(bytearray(activation.data), dtype=dtype).reshape(activation.shape).to(device)
