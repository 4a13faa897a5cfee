"""A cluster file that asks for more than the model or its engine can do is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from resplit.cluster.model_check import ensure_servable, learned_positions
from resplit.config import ClusterConfig, parse_cluster
from resplit.errors import ConfigError
from resplit.model.spec import ModelSpec

LLAMA = {"model_type": "llama", "max_position_embeddings": 2048}
SPEC = ModelSpec("torch", "float32", "layer", LLAMA, (), 97, 64, 4, 2, 16)


def cluster(context_tokens: int = 512, **node: Any) -> ClusterConfig:
    return parse_cluster(
        {
            "name": "one",
            "source": "hub",
            "trusted": ["hub"],
            "nodes": [{"name": "hub", "memory": "1 GiB", **node}],
            "classes": [{"name": "chat", "rate_rps": 0.5, "prompt_tokens": 32, "new_tokens": 12}],
            "limits": {"context_tokens": context_tokens},
            "kv_tokens": 8192,
        },
        "cluster.yaml",
    )


def test_a_context_beyond_the_learned_positions_is_refused_with_both_numbers() -> None:
    ensure_servable(cluster(2048), SPEC)
    with pytest.raises(ConfigError, match=r"limits.context_tokens: 2049 tokens, and the model knows 2048 positions"):
        ensure_servable(cluster(2049), SPEC)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"n_positions": 1024}, 1024),
        (LLAMA, 2048),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 2048),
        (LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 8192),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "llama3", "factor": 8.0,
          "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
          "original_max_position_embeddings": 32768}}, 131072),
        ({"model_type": "other"}, None),
    ],
)  # fmt: skip
def test_a_stretched_rotary_embedding_knows_more_positions(config: dict[str, Any], positions: int | None) -> None:
    assert learned_positions(config) == positions


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_needs_the_torch_engine_and_the_error_says_so(device: str) -> None:
    ensure_servable(cluster(device=device), SPEC)
    with pytest.raises(ConfigError, match=rf"nodes.hub.device: {device}, .*set `engine: torch`.* or `device: cpu`"):
        ensure_servable(cluster(device=device), replace(SPEC, engine="onnx"))
    ensure_servable(cluster(device="cpu"), replace(SPEC, engine="onnx"))
