"""Engines that hold blocks of a given model, without storing it first."""

from __future__ import annotations

from typing import Any

import torch

from resplit.errors import ResplitError
from resplit.model.activation import Activation
from resplit.model.engines import open_engine
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.packaging import packager_for


def engine_with(
    model: torch.nn.Module,
    blocks: list[int] | None = None,
    split: str = "layer",
    engine: str = "torch",
    weights: str = "float32",
) -> Engine[Any]:
    """An engine that holds these blocks of the model (all by default)."""
    packager = packager_for(model.config, weights, split, engine)
    state, contents = model.state_dict(), {}
    for index in range(len(packager.chain.specs)) if blocks is None else blocks:
        names = packager.chain.tensor_names(index)
        contents[index] = packager.content(index, {name: state[path] for name, path in names.items()})
    opened = open_engine(packager.spec([float(len(contents.get(i, b""))) for i in range(len(packager.chain.specs))]))
    for index, content in contents.items():
        opened.load(index, content)
    return opened


def run_rows(
    engine: Engine[Any], session: str, blocks: tuple[int, int], start: int, values: Activation, capacity: int = 64
) -> Activation:
    """One pass of one session through the blocks `first..last`; raises the error that the engine answers."""
    (result,) = engine.run(*blocks, [SessionRows(session, start, capacity, values)])
    if isinstance(result, ResplitError):
        raise result
    return result
