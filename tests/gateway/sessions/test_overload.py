"""Four times the load that two sessions can serve: admitted requests are in time, the others are refused at once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import torch

from resplit.config import ClusterConfig
from resplit.errors import CapacityError
from resplit.gateway.engine import GenerationRequest
from resplit.model.source import StoredModel
from resplit.status import GatewayStatus
from resplit.types import Sampling
from tests.support.cluster import reference
from tests.support.in_process import InProcessCluster, deploy, in_process, until

A, B = "alpha", "beta"
PROMPT = (5, 17, 40, 200, 31, 8, 99)
NEW_TOKENS = 6
SLO_S = 1.5
TIMES = {"embed": "1 ms", "layer": "4 ms", "head": "4 ms"}  # a token takes 30 ms, a request about 0.2 s
EMULATE = {"decode_per_token": TIMES, "prefill_per_token": dict.fromkeys(TIMES, "0.2 ms")}


def config() -> ClusterConfig:
    usual = {"rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": A,
            "trusted": [A, B],
            "nodes": [{"name": name, "memory": "8 MiB", "emulate": EMULATE} for name in (A, B)],
            "links": {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}},
            "classes": [
                {"name": "prompt", "slo": f"{SLO_S} s", "shed_late": True, **usual},
                {"name": "patient", **usual},
            ],
            "limits": {"context_tokens": 64, "sessions": 2, "queue": 32, "deadline": "20 s"},
            "kv_tokens": 64,
        }
    )


async def send(
    nodes: InProcessCluster, request_class: str, leaves_after: int, expected: list[int]
) -> tuple[str, float]:
    """The outcome of a request, and how long it took. The client leaves after `leaves_after` tokens (0: never)."""
    clock = asyncio.get_running_loop().time
    begun_s, tokens = clock(), []
    stream = nodes.sessions.generate(GenerationRequest(PROMPT, NEW_TOKENS, Sampling(), request_class, frozenset()))
    try:
        async for token in stream:
            tokens.append(token.token_id)
            if len(tokens) == leaves_after:
                return "left", clock() - begun_s
    except CapacityError as refusal:
        return "late" if "in which this class" in str(refusal) else "full", clock() - begun_s
    finally:
        await stream.aclose()
    assert tokens == expected
    return f"served {request_class}", clock() - begun_s


async def test_under_four_times_the_load_admitted_requests_are_in_time_and_others_are_refused_at_once(
    stored_model: StoredModel, tmp_path: Path, unsplit_model: torch.nn.Module
) -> None:
    expected, rng = reference(unsplit_model, list(PROMPT), NEW_TOKENS), random.Random(4)
    async with in_process(config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.membership.introduce()
        await deploy(controller, [A, A, A, B, B, B, B, A])
        alone = [await send(nodes, "prompt", 0, expected) for _ in range(3)]
        idle = len(asyncio.all_tasks())
        arrivals = []
        for _ in range(100):  # 40 a second, while each of two sessions serves fewer than 5
            request_class = "patient" if rng.random() < 0.1 else "prompt"
            leaves_after = rng.randrange(1, NEW_TOKENS) if rng.random() < 0.1 else 0
            arrivals.append(asyncio.create_task(send(nodes, request_class, leaves_after, expected)))
            await asyncio.sleep(rng.expovariate(40))
        outcomes = await asyncio.gather(*arrivals)
        counted = Counter(outcome for outcome, _ in outcomes)
        assert counted["late"] > 20
        assert counted["served prompt"] >= 3
        assert counted["served patient"] >= 1
        served_s = [took_s for outcome, took_s in outcomes if outcome == "served prompt"]
        assert max(served_s) < 3 * SLO_S
        refused_s = sorted(took_s for outcome, took_s in outcomes if outcome in ("late", "full"))
        assert refused_s[len(refused_s) * 3 // 4] < 0.5
        assert nodes.sessions.status() == GatewayStatus(sessions=0, waiting=0, ready="yes")

        async def idle_again() -> bool:
            held = [(await nodes.state(name)).sessions for name in (A, B)]
            return held == [0, 0] and len(asyncio.all_tasks()) <= idle + 2

        await until(idle_again)
        again = [await send(nodes, "prompt", 0, expected) for _ in range(3)]
        assert min(took_s for _, took_s in again) < 3 * max(took_s for _, took_s in alone)
        await controller.stop()
