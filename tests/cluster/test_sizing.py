"""What a model needs on the nodes of a cluster file, and how fast it will be there."""

from __future__ import annotations

import pytest

from resplit.cluster.sizing import describe, for_users, size
from resplit.config import ClusterConfig
from resplit.model.source import StoredModel

TIMES = {"embed": "1 ms", "layer": "10 ms", "head": "20 ms"}


def cluster(memory: str) -> ClusterConfig:
    """One emulated node with this memory."""
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alone",
            "trusted": ["alone"],
            "nodes": [
                {
                    "name": "alone",
                    "memory": memory,
                    "emulate": {"decode_per_token": TIMES, "prefill_per_token": TIMES},
                }
            ],
            "links": {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}},
            "classes": [{"name": "chat", "rate_rps": 0.01, "prompt_tokens": 8, "new_tokens": 8}],
            "kv_tokens": 1,
        }
    )


def test_the_memory_and_the_speed_of_a_model_are_those_of_its_blocks(stored_model: StoredModel) -> None:
    blocks = stored_model.spec.blocks
    found = size(for_users(cluster("64 MiB"), users=4, context_tokens=100), stored_model, 2.0)

    assert found.kv_tokens == 400
    assert found.reason is None
    needed = sum(block.weight_bytes + 400 * block.kv_bytes_per_token for block in blocks)
    assert found.nodes[0].needed_bytes == needed
    layers = sum(block.kind == "layer" for block in blocks)
    assert found.token_s == pytest.approx(0.021 + 0.010 * layers)
    assert f"{1 / found.token_s:.1f} tokens/s for one user" in describe(found)


def test_a_model_that_does_not_fit_is_named_with_the_reason(stored_model: StoredModel) -> None:
    found = size(for_users(cluster("1 MiB"), users=4, context_tokens=100), stored_model, 2.0)

    assert "memory" in (found.reason or "")
    assert f"does not fit: {found.reason}" in describe(found)
