"""Two nodes, `trusted` and `plain`, and commands that go to `plain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resplit.config import ClusterConfig
from resplit.model.activation import Activation
from resplit.model.source import StoredModel
from resplit.security.identity import CONTROLLER
from resplit.wire.cache_stream import OutgoingPart
from resplit.wire.commands import Reply
from tests.support.in_process import InProcessCluster

MIDDLE = ["trusted", "trusted", "plain", "plain", "trusted", "trusted", "trusted", "trusted"]
LATER = ["trusted", "trusted", "trusted", "plain", "plain", "trusted", "trusted", "trusted"]


def two_node_config(memory: str = "8 MiB", **more: Any) -> ClusterConfig:
    """`memory` and `more` are keys of the node `plain`. With `more`, the links are emulated, with 1 ms latency."""
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "trusted",
            "trusted": ["trusted"],
            "nodes": [{"name": "trusted", "memory": "8 MiB"}, {"name": "plain", "memory": memory} | more],
            "links": {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}} if more else None,
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "kv_tokens": 64,
        }
    )


async def prepare(nodes: InProcessCluster, placement: list[str], epoch: int, **more: Any) -> Reply:
    """Prepare an epoch on `plain`."""
    return await nodes.command("plain", "prepare", nodes.prepare_body("plain", placement, epoch, **more), epoch)


async def commit(nodes: InProcessCluster, epoch: int) -> Reply:
    """Commit a prepared epoch on `plain`."""
    return await nodes.command("plain", "commit", {"epoch": epoch}, epoch)


def layer_bytes(model: StoredModel, kv_tokens: int) -> float:
    """The memory that one layer needs, with its caches."""
    layer = model.features(1)[2]
    return layer.weight_bytes + kv_tokens * layer.kv_bytes_per_token


async def take_caches(nodes: InProcessCluster, session: str, blocks: Sequence[int], capacity: int) -> None:
    """Give `plain` a permit for the caches of these blocks from the controller, and send it four positions of each."""
    await nodes.permit("plain", session, capacity=capacity, senders=dict.fromkeys(blocks, CONTROLLER))
    await nodes.peer("plain").cache([part for block in blocks for part in cache_parts(session, block)])


def cache_parts(session: str, block: int) -> list[OutgoingPart]:
    """Four positions of one layer's cache: (2, heads, positions, width)."""
    zeros = Activation("float32", (2, 2, 4, 16), bytes(2 * 2 * 4 * 16 * 4))
    return [OutgoingPart(session, attempt=0, blocks=(block,), first=0, caches=[zeros])]
