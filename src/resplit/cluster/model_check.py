"""Whether a model can be served as a cluster file says: how long contexts get, and which devices compute."""

from __future__ import annotations

from typing import Any

from resplit.config import ClusterConfig
from resplit.errors import ConfigError
from resplit.model.engines import ONNX_DEVICES
from resplit.model.spec import ModelSpec


def ensure_servable(cluster: ClusterConfig, spec: ModelSpec) -> None:
    """ConfigError if a context may pass the model's positions, or if a node's device needs another engine."""
    positions, wanted = learned_positions(spec.config), cluster.limits.context_tokens
    if positions is not None and wanted > positions:
        raise ConfigError(
            "limits.context_tokens",
            f"{wanted} tokens, and the model knows {positions} positions; set it to {positions} or less",
        )
    for node in cluster.nodes:
        if spec.engine == "onnx" and node.device not in ONNX_DEVICES:
            raise ConfigError(
                f"nodes.{node.name}.device",
                f"{node.device}, and the onnx engine computes on cpu only; set `engine: torch` for the cluster, or "
                "`device: cpu` for this node",
            )


def learned_positions(config: dict[str, Any]) -> int | None:
    """The positions that a model with this Hugging Face config knows; None if the config does not say.

    A rotary embedding that is stretched by a factor knows so many times its original positions.
    """
    stated = config.get("max_position_embeddings") or config.get("n_positions")
    if stated is None:
        return None
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rotary.get("original_max_position_embeddings") or stated
    return max(int(stated), int(original * (rotary.get("factor") or 1.0)))
