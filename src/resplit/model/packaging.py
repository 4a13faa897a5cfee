"""How a model is packaged: which engine will run it, what its blocks contain, and how the whole is described."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save
from transformers import PretrainedConfig

from resplit.errors import ModelError
from resplit.model.calibration import Calibration, sample_tokens
from resplit.model.engines.onnx.families import decoder_of, unsupported_reason
from resplit.model.engines.torch.blocks import Chain, features
from resplit.model.engines.torch.engine import DTYPES, chain_of
from resplit.model.spec import ModelSpec
from resplit.types import EngineChoice, EngineName, Split, Width


class Packager(Protocol):
    """Packages the blocks of one model for one engine; `chain` names the blocks and their tensors."""

    chain: Chain

    def content(self, index: int, tensors: Mapping[str, torch.Tensor]) -> bytes:
        """The content of block `index`, from its tensors by their names within it."""
        ...

    def spec(self, weight_bytes: Sequence[float]) -> ModelSpec:
        """The description of the packaged model; `weight_bytes` has the size of each block."""
        ...


# Weights are packaged in full width first. The place from which a model was read is nobody's business, and would make
# the same model another one when it is read again from elsewhere.
_NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path")


def packager_for(
    config: PretrainedConfig, weights: Width, split: Split, engine: EngineChoice, tokenizer: Any = None
) -> Packager:
    """The packager of the chosen engine; ModelError if that engine cannot run the model in this width.

    With the model's `tokenizer`, 4-bit weights are fitted to a sample text; blocks must then be packaged in order.
    """
    plain = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    plain = json.loads(json.dumps(plain, default=str))
    onnx_reason = unsupported_reason(plain, weights)
    if engine == "onnx" and onnx_reason:
        raise ModelError(f"the ONNX engine cannot run this model: {onnx_reason}; choose `engine: torch`")
    if engine == "torch" or onnx_reason:
        if weights not in DTYPES:
            reason = f" ({onnx_reason})" if engine == "auto" else ""
            raise ModelError(f"the torch engine has no weights in {weights}{reason}; it has {', '.join(DTYPES)}")
        return TorchPackager(plain, weights, split)
    return OnnxPackager(plain, weights, split, tokenizer)


class TorchPackager:
    """Blocks as safetensors in the dtype of the engine."""

    def __init__(self, config: dict[str, Any], weights: Width, split: Split) -> None:
        self.chain = chain_of(config, split)
        self._weights, self._dtype = weights, DTYPES[weights]

    def content(self, index: int, tensors: Mapping[str, torch.Tensor]) -> bytes:
        """The content of block `index`, from its tensors by their names within it."""
        return bytes(save({name: tensor.to(self._dtype).contiguous() for name, tensor in tensors.items()}))

    def spec(self, weight_bytes: Sequence[float]) -> ModelSpec:
        """The description of the packaged model; `weight_bytes` has the size of each block."""
        return _spec("torch", self.chain, self._weights, weight_bytes, self._dtype.itemsize)


class OnnxPackager:
    """Blocks as ONNX graphs with their weights."""

    def __init__(self, config: dict[str, Any], weights: Width, split: Split, tokenizer: Any) -> None:
        self.chain = chain_of(config, split)
        self._decoder, self._weights = decoder_of(config), weights
        self._calibration: Calibration | None = None
        if weights == "int4" and tokenizer is not None:
            self._calibration = Calibration(self.chain, sample_tokens(tokenizer, self._decoder.vocabulary))
        rotary = self.chain.rotary
        assert rotary is not None
        self._rotary = np.append(rotary.inv_freq.numpy(), rotary.attention_scaling).astype(np.float32)

    def content(self, index: int, tensors: Mapping[str, torch.Tensor]) -> bytes:
        """The content of block `index`, from its tensors by their names within it."""
        from resplit.model.engines.onnx.packaging import package_block

        block = self.chain.specs[index]
        arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
        moments = self._calibration.moments(index, tensors) if self._calibration else {}
        return package_block(self._decoder, self._weights, block.kind, block.layer, arrays, moments, self._rotary)

    def spec(self, weight_bytes: Sequence[float]) -> ModelSpec:
        """The description of the packaged model; `weight_bytes` has the size of each block."""
        return _spec("onnx", self.chain, self._weights, weight_bytes, item_bytes=4)


def _spec(
    engine: EngineName, chain: Chain, weights: Width, weight_bytes: Sequence[float], item_bytes: int
) -> ModelSpec:
    kv_heads, head_width = chain.cache_shape
    return ModelSpec(
        engine=engine,
        weights=weights,
        split="layer" if all(block.kind not in ("attention", "mlp") for block in chain.specs) else "sublayer",
        config=json.loads(json.dumps(chain.config.to_dict(), default=str)),
        blocks=features(chain, weight_bytes, item_bytes),
        vocabulary=chain.config.vocab_size,
        hidden_size=chain.config.hidden_size,
        heads=chain.config.num_attention_heads,
        kv_heads=kv_heads,
        head_width=head_width,
    )
