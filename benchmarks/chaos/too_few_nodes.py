"""Too few nodes remain to serve.

Requests must get 503 with the reason within seconds. Private blocks must stay off untrusted nodes, and service must
resume by itself once a node returns.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.chaos.findings import Finding, quantile, spread
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from tests.support.cluster import CLUSTER, NODES, TRUSTED, load_unsplit, make_model, started
from tests.support.processes import kill, poll_until, ready
from tests.support.streams import expected_tokens, request_completion

ROUNDS = 3
NEW_TOKENS = 24
REFUSED_WITHIN_S = 5.0
# A node has room for two layers with their caches, so three nodes hold the model and two do not.
SMALL = CLUSTER.replace("4 MiB", "1.5 MiB")


async def run(scale: float, folder: Path) -> list[Finding]:
    """In turn, the survivors lack memory, and both trusted nodes are lost."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)[0]
    refused_s: list[float] = []
    back_s: list[float] = []
    reasons: list[str] = []
    right, violations = 0, 0
    with started(folder, model, SMALL) as cluster, ControlClient(cluster.url, cluster.token) as client:
        for victims in [("gamma", "delta"), TRUSTED] * max(1, round(ROUNDS * scale)):
            used = sorted(set(client.model().placement or ()) & set(victims))
            assert used, "a victim that serves"
            killed_s = min([kill(cluster, victim) for victim in victims])
            reasons.append(await refusal(cluster))
            refused_s.append(time.monotonic() - killed_s)
            violations += len(misplaced(client))
            for victim in victims:
                start_process(cluster, victim)
            back_s.append(await poll_until(lambda: ready(client), 60))
            right += request_completion(cluster, NEW_TOKENS).json()["choices"][0].get("token_ids") == expected
            violations += len(misplaced(client))
            await poll_until(lambda: not client.model().lost, 60)
    rounds = len(reasons)
    named = sum("no placement" in reason for reason in reasons)
    return [
        Finding(
            "too_few_nodes",
            "time from the kill of two nodes to 503 with the reason",
            spread(refused_s, "s"),
            f"max < {REFUSED_WITHIN_S:g} s",
            met=quantile(refused_s, 1.0) < REFUSED_WITHIN_S,
        ),
        Finding(
            "too_few_nodes", "answers that name the reason", f"{named} of {rounds}", str(rounds), met=named == rounds
        ),
        Finding("too_few_nodes", "time from the start of the nodes until requests are served", spread(back_s, "s")),
        Finding(
            "too_few_nodes", "correct answers afterwards", f"{right} of {rounds}", str(rounds), met=right == rounds
        ),
        Finding(
            "too_few_nodes", "private blocks on nodes that are not trusted", str(violations), "0", met=violations == 0
        ),
    ]


async def refusal(cluster: Cluster) -> str:
    """Send requests until one gets 503. Returns its message."""
    message = ""

    def refused() -> bool:
        nonlocal message
        answer = request_completion(cluster, NEW_TOKENS)
        if answer.status_code == 503:
            message = answer.json()["error"]["message"]
        return bool(message)

    await poll_until(refused, 60)
    return message


def misplaced(client: ControlClient) -> list[tuple[str, int]]:
    """Every private block on a node that is not trusted."""
    status = client.status()
    private = {index for index, name in enumerate(status.blocks) if name in ("embed", "layer.0", "head")}
    held = {node.node: set(node.blocks) for node in status.nodes if node.node in NODES}
    return [(name, block) for name, blocks in held.items() if name not in TRUSTED for block in blocks & private]
