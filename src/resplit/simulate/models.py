"""Models for the simulator: files that state the sizes of blocks. No weights are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resplit.errors import ConfigError
from resplit.privacy import sensitivity, with_private_layers
from resplit.types import BlockFeatures

__all__ = ["load_model"]

_Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _BlockSizes(BaseModel):
    """The sizes of one kind of block. Fields as in `types.BlockFeatures`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: Annotated[int, Field(ge=0)] = 0
    weight_bytes: _Count
    activation_bytes_per_token: _Count
    kv_bytes_per_token: _Count = 0.0
    flops_per_token: _Count = 0.0
    flops_per_context_token: _Count = 0.0


class _ModelSizes(BaseModel):
    """A chain embed, layer.0 .. layer.n-1, head with equal layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    layers: Annotated[int, Field(ge=1)]
    embed: _BlockSizes
    layer: _BlockSizes
    head: _BlockSizes


def load_model(path: Path, private_layers: int) -> tuple[BlockFeatures, ...]:
    """The features of every block of the model in the file at `path`; ConfigError names the key and the rule.

    Embed, the first `private_layers` layers and head are private.
    """
    try:
        model = _ModelSizes.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}", first["msg"]) from None
    blocks = [_features("embed", "embed", model.embed, sensitivity(None, model.layers))]
    blocks += [
        _features(f"layer.{layer}", "layer", model.layer, sensitivity(layer, model.layers))
        for layer in range(model.layers)
    ]
    blocks.append(_features("head", "head", model.head, sensitivity(None, model.layers)))
    return with_private_layers(blocks, private_layers)


def _features(
    name: str, kind: Literal["embed", "layer", "head"], block: _BlockSizes, sensitivity: float
) -> BlockFeatures:
    return BlockFeatures(name=name, kind=kind, private=False, sensitivity=sensitivity, **block.model_dump())
