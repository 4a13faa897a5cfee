"""How long a stream pauses when the placement changes, by the size of its cache and the speed of the links.

A change lasts from the proposal until every session has left the old epoch. A stream's pause is its longest gap between
tokens during the change, minus its longest gap in an equally long window just before. The same difference between two
windows without a change is the control; it shows the noise. Nodes are emulated, so that they leave cores free.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import matplotlib as mpl

from benchmarks.chaos.findings import Finding, quantile, spread, stream_findings
from resplit.cluster.client import ControlClient
from resplit.epochs import Proposal
from tests.support.cluster import NODES, load_unsplit, make_model, started
from tests.support.processes import poll_until
from tests.support.streams import Streams, expected_tokens, streaming

mpl.use("svg")
import matplotlib.pyplot as plt

SWITCHES = 10
NEW_TOKENS = 500
PAUSE_S = 0.050
# 12 KiB of cache for each position, so that histories of these lengths differ by megabytes.
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 64}
CACHE_BYTES = 6 * 2 * 4 * 64 * 4
SHORTEST_WINDOW_S = 2.0
A, B, C, D = NODES
PLACEMENTS = ([A, A, B, C, C, D, D, A], [A, A, C, D, D, B, B, A])  # five of eight blocks move, and their caches


@dataclass(frozen=True)
class Links:
    """Links of one speed between emulated nodes."""

    name: str
    latency_ms: float
    bandwidth_mbps: float

    @property
    def round_trip_s(self) -> float:
        """The round trip of a small message."""
        return 2e-3 * self.latency_ms


LOOPBACK = Links("loopback, unshaped", 0, 1e6)  # no delay is added
NEAR = Links("300 Mbit/s, 2 ms", 2, 300)
FAR = Links("60 Mbit/s, 22 ms", 22, 60)
SETTINGS = [
    (LOOPBACK, 32),
    (LOOPBACK, 256),
    (LOOPBACK, 1024),
    (NEAR, 32),
    (NEAR, 256),
    (NEAR, 1024),
    (FAR, 32),
    (FAR, 256),
]


@dataclass
class Pauses:
    """Measurements at one link speed and one length of history, for each stream and switch.

    `control_s` is the pause without a change. `gateway_s` is the duration of the second copy,
    as the gateway measured it.
    """

    links: str
    history: int
    pause_s: list[float] = field(default_factory=list)
    quiet_s: list[float] = field(default_factory=list)
    control_s: list[float] = field(default_factory=list)
    gateway_s: list[float] = field(default_factory=list)
    moved_bytes: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)


async def run(scale: float, folder: Path) -> list[Finding]:
    """10 switches in each setting. A short run covers only the loopback."""
    found: list[Pauses] = []
    findings: list[Finding] = []
    settings = SETTINGS if scale >= 0.2 else SETTINGS[:2]
    model = make_model(folder, **SHAPE, max_position_embeddings=2048)
    whole = load_unsplit(model)
    for links, history in settings:
        place = folder / f"{links.name.replace('/', ' per ')} {history}"
        place.mkdir()
        prompts = [[(7 * k + 3 * i) % 250 + 5 for i in range(history)] for k in range(8)]
        expected = expected_tokens(whole, NEW_TOKENS, prompts)
        one = Pauses(links.name, history)
        with (
            started(place, model, cluster_file(links), plan=False) as cluster,
            ControlClient(cluster.url, cluster.token) as client,
        ):
            propose(client, 0)
            async with streaming(cluster, expected, prompts) as streams:
                await measure(client, streams, one, max(2, round(SWITCHES * scale)))
            moves = [move for record in client.records() for move in record.moves]
        one.gateway_s = [move.pause_s for move in moves]
        one.moved_bytes = [move.cache_bytes for move in moves]
        found.append(one)
        findings += [*stream_findings("pauses", streams), *_findings(one, links)]
        (folder / "pauses.json").write_text(json.dumps([asdict(each) for each in found]) + "\n")
        plot(found, folder / "pauses.svg")
    return findings


async def measure(client: ControlClient, streams: Streams, pauses: Pauses, switches: int) -> None:
    """Switch back and forth. Before each switch come two quiet windows, each as long as the switch before."""
    window_s = SHORTEST_WINDOW_S
    for number in range(1, switches + 1):
        await asyncio.sleep(2.4 * window_s)
        begun_s = time.monotonic()
        epoch = await asyncio.to_thread(propose, client, number)
        await poll_until(partial(only, client, epoch), 120, every_s=0.1)
        pauses.took_s.append(time.monotonic() - begun_s)
        window_s = max(SHORTEST_WINDOW_S, pauses.took_s[-1])
        await asyncio.sleep(max(0.0, window_s - pauses.took_s[-1]) + 0.2)
        pauses.control_s += [after - before for before, after in streams.gaps_around(begun_s - window_s, window_s)]
        for quiet_s, gap_s in streams.gaps_around(begun_s, window_s):
            pauses.quiet_s.append(quiet_s)
            pauses.pause_s.append(gap_s - quiet_s)


def propose(client: ControlClient, number: int) -> int:
    """Deploy one of the two placements. Returns its epoch."""
    epoch = client.model().epoch
    return client.propose(Proposal(tuple(PLACEMENTS[number % 2]), "re-split", epoch)).epoch


def only(client: ControlClient, epoch: int) -> bool:
    """Whether all nodes serve this epoch only."""
    return all(node.epochs == (epoch,) for node in client.status().nodes)


def cluster_file(links: Links) -> str:
    """A cluster file with four nodes, each with room for the whole model; a block takes a few milliseconds."""
    decode = "{embed: 1 ms, layer: 4 ms, head: 3 ms}"
    prefill = "{embed: 0.02 ms, layer: 0.1 ms, head: 0.1 ms}"
    emulate = f"emulate: {{decode_per_token: {decode}, prefill_per_token: {prefill}}}"
    nodes = "\n".join(f"  - {{name: {name}, memory: 512 MiB, max_utilization: 0.999, {emulate}}}" for name in NODES)
    shape = f"latency: {links.latency_ms} ms, bandwidth: {links.bandwidth_mbps} Mbit/s"
    return f"""
name: test
source: alpha
trusted: [alpha, beta]
nodes:
{nodes}
links: {{default: {{{shape}}}}}
classes:
  - {{name: chat, rate_rps: 0.1, prompt_tokens: 12, new_tokens: 40}}
limits: {{context_tokens: 2048, sessions: 16, queue: 8, deadline: 600 s}}
kv_tokens: 16384
"""


def plot(found: list[Pauses], path: Path) -> None:
    """Plot the 95th percentile and the median of the pauses against the cache size of a stream."""
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name in dict.fromkeys(each.links for each in found):
        those = [each for each in found if each.links == name]
        mebibytes = [each.history * CACHE_BYTES / 2**20 for each in those]
        (line,) = axes.plot(mebibytes, [1e3 * quantile(each.pause_s, 0.95) for each in those], "o-", label=name)
        axes.plot(mebibytes, [1e3 * quantile(each.pause_s, 0.5) for each in those], "--", color=line.get_color())
    axes.set(xscale="log", xlabel="cache of a stream (MiB)", ylabel="pause (ms): p95, dashed p50")
    axes.axhline(1e3 * PAUSE_S, color="grey", linewidth=0.8)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _findings(one: Pauses, links: Links) -> list[Finding]:
    where = f"{links.name}, history {one.history} ({one.history * CACHE_BYTES / 2**20:.1f} MiB)"
    limit_s = PAUSE_S + links.round_trip_s
    p95_s = quantile(one.pause_s, 0.95)
    real = links is LOOPBACK
    return [
        Finding(
            "pauses",
            f"pause of a stream, {where}",
            spread(one.pause_s),
            f"p95 <= {1e3 * limit_s:.0f} ms" if real else "",
            met=p95_s <= limit_s if real else None,
        ),
        Finding("pauses", f"the same without a switch (control), {where}", spread(one.control_s)),
        Finding("pauses", f"longest gap of a stream without a switch, {where}", spread(one.quiet_s)),
        Finding("pauses", f"the pause that the gateway measured, {where}", spread(one.gateway_s)),
        Finding(
            "pauses",
            f"duration of a switch, until the last session left the old epoch, {where}",
            spread(one.took_s, "s"),
        ),
        Finding(
            "pauses",
            f"cache transferred for a stream, {where}",
            f"p50 {quantile(one.moved_bytes, 0.5) / 2**20:.2f} MiB",
        ),
    ]
