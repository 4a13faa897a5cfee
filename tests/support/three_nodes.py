"""Three nodes of equal size, of which `alpha` and `beta` are trusted, and requests to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from resplit.config import ClusterConfig
from resplit.gateway.engine import GenerationRequest
from resplit.gateway.sessions.manager import Sessions
from resplit.types import Sampling

A, B, C = "alpha", "beta", "gamma"
SPREAD = [A, A, B, B, C, C, B, A]
TURNED = [B, B, A, C, C, A, C, B]
PROMPT = (5, 17, 40, 200, 31, 8, 99)
KV_TOKENS = 256


def three_node_config(**more: object) -> ClusterConfig:
    """`more` replaces entries of the cluster file."""
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": A,
            "trusted": [A, B],
            "nodes": [{"name": name, "memory": "8 MiB"} for name in (A, B, C)],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "limits": {"context_tokens": KV_TOKENS, "sessions": 8, "queue": 4, "deadline": "20 s"},
            "kv_tokens": KV_TOKENS,
        }
        | more
    )


def generation_request(new_tokens: int = 12, prompt: tuple[int, ...] = PROMPT, **more: Any) -> GenerationRequest:
    """A greedy request of class chat that does not end early."""
    return replace(GenerationRequest(prompt, new_tokens, Sampling(), "chat", frozenset()), **more)


async def generate(sessions: Sessions, request: GenerationRequest) -> list[int]:
    """The tokens of one request."""
    return [token.token_id async for token in sessions.generate(request)]
