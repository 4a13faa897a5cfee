"""Engines that hold blocks of a given model, without storing it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from resplit.errors import ResplitError
from resplit.model.activation import Activation, token_ids
from resplit.model.engines import open_engine
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.packaging import packager_for
from resplit.model.sampling import sample
from resplit.model.source import StoredModel
from resplit.types import Device, EngineChoice, Sampling, Split, Width


def engine_with(
    model: torch.nn.Module,
    blocks: list[int] | None = None,
    split: Split = "layer",
    engine: EngineChoice = "torch",
    weights: Width = "float32",
    device: Device = "auto",
) -> Engine[Any]:
    """An engine that holds these blocks of the model (all by default)."""
    packager = packager_for(model.config, weights, split, engine)
    state, contents = model.state_dict(), {}
    for index in range(len(packager.chain.specs)) if blocks is None else blocks:
        names = packager.chain.tensor_names(index)
        contents[index] = packager.content(index, {name: state[path] for name, path in names.items()})
    sizes = [float(len(contents.get(i, b""))) for i in range(len(packager.chain.specs))]
    opened = open_engine(packager.spec(sizes), device=device)
    for index, content in contents.items():
        opened.load(index, content)
    return opened


def stored_engine(model: StoredModel, threads: int = 1) -> Engine[Any]:
    """An engine that holds all blocks of a stored model."""
    engine = open_engine(model.spec, threads)
    for index, block in enumerate(model.spec.blocks):
        engine.load(index, model.content(block.name))
    return engine


def tokens_of_one_engine(
    model: StoredModel, prompt: Sequence[int], new_tokens: int, sampling: Sampling | None = None
) -> list[int]:
    """The tokens of the unsplit model in its own engine and width, one pass after another."""
    engine, position = stored_engine(model), 0
    tokens, step = [], list(prompt)
    for _ in range(new_tokens):
        logits = run_rows(engine, "s", (0, len(engine.kinds) - 1), position, token_ids(step), 1024)
        position += len(step)
        step = list(sample(logits, sampling or Sampling(), position - 1))
        tokens += step
    return tokens


def run_rows(
    engine: Engine[Any], session: str, blocks: tuple[int, int], start: int, values: Activation, capacity: int = 64
) -> Activation:
    """One pass of one session through the blocks `first..last`; raises the error that the engine answers."""
    (result,) = engine.run(*blocks, [SessionRows(session, start, capacity, values)])
    if isinstance(result, ResplitError):
        raise result
    return result
