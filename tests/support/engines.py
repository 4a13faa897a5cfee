"""Engines that hold blocks of a given model, without packaging it first."""

from __future__ import annotations

import torch
from safetensors.torch import save

from resplit.model.engine import ModelSpec, TorchEngine


def engine_with(model: torch.nn.Module, blocks: list[int] | None = None, split: str = "layer") -> TorchEngine:
    """An engine that holds these blocks of the model (all by default)."""
    engine = TorchEngine(ModelSpec(model.config.to_dict(), "float32", split))
    state = model.state_dict()
    for index in range(len(engine.kinds)) if blocks is None else blocks:
        names = engine.chain.tensor_names(index)
        engine.load(index, save({name: state[path].clone() for name, path in names.items()}))
    return engine
