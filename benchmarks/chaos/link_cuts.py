"""A node's links break or stall for two seconds. Streams continue, and the node is used again."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path

import yaml

from benchmarks.chaos.findings import Finding, stream_findings
from benchmarks.chaos.kills import NEW_TOKENS, use_all
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, free_ports, start_process
from resplit.security.identity import CONTROLLER
from resplit.wire.addresses import Address
from tests.support.cluster import NODES, load_unsplit, make_model, started
from tests.support.processes import answering, command_of, kill, poll_until, ready, settled
from tests.support.streams import expected_tokens, streaming
from tests.support.tcp_proxy import TcpProxy

ROUNDS = 10
CUT_S = 2.0


async def run(scale: float, folder: Path) -> list[Finding]:
    """10 cuts of random nodes. Every second one breaks the connections; the others only stall the traffic."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    rng, rounds = random.Random(14), max(2, round(ROUNDS * scale))
    with started(folder, model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        proxies = await start_proxies(cluster)
        await poll_until(lambda: ready(client) and answering(client, *NODES), 60)
        async with streaming(cluster, expected) as streams:
            for number in range(rounds):
                await asyncio.to_thread(use_all, client, rng)
                await asyncio.sleep(rng.uniform(0.1, 1.0))
                victim = rng.choice(NODES)
                await cut(proxies[victim], broken=number % 2 == 0)
                await poll_until(partial(answering, client, victim))
        await poll_until(lambda: settled(client))
    for proxy in proxies.values():
        proxy.close()
    return [
        *stream_findings("link_cuts", streams),
        Finding("link_cuts", f"cuts of one node's links for {CUT_S:g} s, after which it is used again", str(rounds)),
        Finding("link_cuts", "sessions and blocks left over on any node at the end", "none", "none", met=True),
    ]


async def start_proxies(cluster: Cluster) -> dict[str, TcpProxy]:
    """Put a proxy before every node, and restart the controller with the proxies' addresses."""
    file = cluster.state / "relayed.yaml"
    content = yaml.safe_load((cluster.state / "cluster.yaml").read_text())
    proxies = {}
    for node, port in zip(content["nodes"], free_ports(len(content["nodes"])), strict=True):
        outside = Address("127.0.0.1", port)
        proxies[node["name"]] = TcpProxy(outside, Address.parse(node["address"]))
        node["address"] = str(outside)
    for proxy in proxies.values():
        await proxy.open()
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    kill(cluster, CONTROLLER)
    old, new = str(cluster.state / "cluster.yaml"), str(file)
    command = command_of(cluster.processes[CONTROLLER])
    start_process(cluster, CONTROLLER, [new if part == old else part for part in command])
    return proxies


async def cut(proxy: TcpProxy, broken: bool) -> None:
    """Cut a node's links for two seconds."""
    if broken:
        proxy.close()
        await asyncio.sleep(CUT_S)
        await proxy.open()
    else:
        proxy.stall()
        await asyncio.sleep(CUT_S)
        proxy.resume()
