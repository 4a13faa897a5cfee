"""Invalid messages on every call of four nodes, while valid streams run beside them."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path

from benchmarks.chaos.findings import Finding, stream_findings
from benchmarks.chaos.resources import sampling
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.wire.addresses import Address
from tests.support.cluster import CLUSTER, load_unsplit, make_model, started
from tests.support.processes import poll_until
from tests.support.streams import PROMPTS, expected_tokens, streaming
from tests.support.wire_fuzzing import Attacker, attack

LASTS_S = 600.0
# So little demand that a plan exists even when this machine is slow.
LIGHT = CLUSTER.replace("rate_rps: 0.5", "rate_rps: 0.02")
NEW_TOKENS = 96
_RAISED = re.compile(r"[a-zA-Z_.]+(Error|Exception|Exit)\b")
# Exceptions that libraries raise for bytes that are no message. They end the call and nothing else.
_NO_MESSAGE = ("google.protobuf.message.DecodeError", "NotImplementedError: Compression", "ssl.SSLError")


async def run(scale: float, folder: Path) -> list[Finding]:
    """Attack four nodes for ten minutes while they serve four streams."""
    model = make_model(folder)
    prompts = PROMPTS[:4]
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS, prompts)
    with started(folder, model, LIGHT) as cluster, ControlClient(cluster.url, cluster.token) as client:
        addresses = {node.name: Address.parse(node.address or "") for node in cluster.config.nodes}
        attacker = Attacker(addresses, cluster.state / "keys" / "delta")
        async with sampling(cluster) as usage, streaming(cluster, expected, prompts) as streams:
            sent = await asyncio.to_thread(attack, attacker, max(5.0, LASTS_S * scale))
        await poll_until(lambda: not any(node.sessions for node in client.status().nodes), 20)
        dead, refusals = cluster.dead(), client.status().nodes
        defects = [line for name in addresses for line in _defects(cluster, name)]
    (folder / "outcomes.txt").write_text("\n".join(f"{n:7} {what}" for what, n in attacker.outcomes.most_common()))
    counted = sum((Counter(node.refusals) for node in refusals), Counter[str]())
    return [
        *stream_findings("fuzz_wire", streams),
        Finding("fuzz_wire", "messages sent", f"{sent}, {len(attacker.outcomes)} outcomes", "> 0", met=sent > 0),
        Finding("fuzz_wire", "processes that ended", ", ".join(dead) or "none", "none", met=not dead),
        Finding(
            "fuzz_wire",
            "hangs and internal errors returned to the caller",
            _few(attacker.broken),
            "none",
            not attacker.broken,
        ),
        Finding("fuzz_wire", "uncaught exceptions in the nodes' logs", _few(Counter(defects)), "none", met=not defects),
        Finding("fuzz_wire", "refused commands that the nodes counted", _few(counted), "> 0", met=bool(counted)),
        *usage.findings("fuzz_wire"),
    ]


def _defects(cluster: Cluster, node: str) -> list[str]:
    """The last line of every traceback in a node's log, except those that bytes without a message cause."""
    lines = (cluster.state / "log" / f"{node}.log").read_text(errors="replace").splitlines()
    ends = [line for line in lines if _RAISED.match(line)]
    return [line[:100] for line in ends if not line.startswith(_NO_MESSAGE)]


def _few(counted: Counter[str]) -> str:
    return "; ".join(f"{number} x {what}" for what, number in counted.most_common(4)) or "none"
