"""Members that join a running cluster of processes with credentials of their own, and lie when a test says so.

They run in the test's process, on its event loop. All other members are processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import yaml

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, free_ports
from resplit.config import parse_cluster
from resplit.node.server import serve_node
from resplit.problem import read_problem
from resplit.security.authority import keys_command
from resplit.wire.addresses import Address
from tests.support.hostile import HostileClient, HostileNode
from tests.support.latest_problem import problem_of
from tests.support.processes import answering, poll_until


def cluster_content(cluster: Cluster, more: Mapping[str, Address] | None = None) -> dict[str, Any]:
    """The cluster file, with `more` nodes at these addresses."""
    content = yaml.safe_load((cluster.state / "cluster.yaml").read_text())
    added = [{"name": name, "memory": "8 MiB", "address": str(address)} for name, address in (more or {}).items()]
    return {**content, "nodes": [*content["nodes"], *added]}


@contextlib.asynccontextmanager
async def joined(
    cluster: Cluster, client: ControlClient, names: Sequence[str]
) -> AsyncIterator[dict[str, HostileNode]]:
    """Let members join that are honest until the test gives them lies; at the end they leave the cluster.

    Meanwhile the latest problem has idle nodes, so that plans do not vary.
    """
    keys_command(cluster.state / "keys", names)
    addresses = {name: Address("127.0.0.1", port) for name, port in zip(names, free_ports(len(names)), strict=True)}
    content = cluster_content(cluster, addresses)
    config, model = parse_cluster(content, "the test's cluster"), await asyncio.to_thread(client.model)
    problem = read_problem(cluster.state / "latest_problem.json")
    members, stop = {name: HostileNode() for name in names}, asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for name, member in members.items():
            tasks.create_task(_serve(cluster, name, content, addresses[name], member, stop))
        try:
            await asyncio.to_thread(client.apply, content)
            await asyncio.to_thread(client.set_problem, problem_of(config, model.features, model.placement or ()))
            await poll_until(lambda: answering(client, *names))
            yield members
        finally:
            for member in members.values():
                member.lies.clear()
            await asyncio.to_thread(client.set_problem, problem)
            await asyncio.to_thread(client.apply, cluster_content(cluster))
            stop.set()


@contextlib.asynccontextmanager
async def in_place_of(cluster: Cluster, name: str, member: HostileNode) -> AsyncIterator[None]:
    """Run `member` where the process of a node was, with that node's keys."""
    content, stop = cluster_content(cluster), asyncio.Event()
    (address,) = (Address.parse(node["address"]) for node in content["nodes"] if node["name"] == name)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_serve(cluster, name, content, address, member, stop))
        try:
            yield
        finally:
            stop.set()


@contextlib.asynccontextmanager
async def speaking_as(cluster: Cluster, name: str) -> AsyncIterator[HostileClient]:
    """A client with a member's credentials, which can call every node."""
    addresses = {node["name"]: Address.parse(node["address"]) for node in cluster_content(cluster)["nodes"]}
    client = HostileClient(addresses, cluster.state / "keys" / name)
    try:
        yield client
    finally:
        await client.disconnect()


async def _serve(
    cluster: Cluster,
    name: str,
    content: dict[str, Any],
    address: Address,
    member: HostileNode,
    stop: asyncio.Event,
) -> None:
    config, state = parse_cluster(content, "the test's cluster"), cluster.state
    await serve_node(name, config, state / "keys" / name, str(state / "registry"), address, stop, member.service)
    member.break_connections()  # as those of a process that ends
