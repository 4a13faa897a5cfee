"""`resplit doctor`: what would keep a cluster from serving well, checked one thing after another, with what to do.

Keys, disk, memory and pace are checked here. Ports, clocks and links are what the running controller knows, or, if
none runs, what the nodes answer to this machine with the controller's keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from resplit.cluster.client import ControlClient
from resplit.cluster.sizing import Sizing, describe, size
from resplit.config import ClusterConfig
from resplit.errors import NodeLostError, PeerFaultError, ResplitError
from resplit.model.source import StoredModel
from resplit.security.identity import CONTROLLER, Member
from resplit.security.key_files import CERTIFICATE, read_certificate
from resplit.security.signing import CommandSigner
from resplit.status import ClusterStatus, wrong_clock
from resplit.telemetry.rows import LinkRow
from resplit.wire.addresses import Address
from resplit.wire.commands import Connect, to_body
from resplit.wire.emulated_link import Shape
from resplit.wire.peers import Peer

_CONNECT_WITHIN_S = 3.0
_MEASURE_WITHIN_S = 60.0
_EXPIRES_SOON = timedelta(days=30)
_SLOW_LINK_BYTES_PER_S = 1e6 / 8
_FAR_LINK_S = 0.1
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was checked: about what, and what was found, with what to do unless all is well."""

    level: Level
    about: str
    says: str


def examine(cluster: ClusterConfig, model: StoredModel, state: Path, url: str) -> list[Diagnosis]:
    """All findings about a cluster whose keys are in `state` and whose gateway is, or will be, at `url`."""
    findings = [*keys(cluster, state / "keys"), *disk(model, state), *fit(cluster, size(cluster, model, 5.0))]
    return findings + (
        _from_controller(cluster, state, url) or asyncio.run(_network(cluster, state / "keys" / CONTROLLER))
    )


def _from_controller(cluster: ClusterConfig, state: Path, url: str) -> list[Diagnosis]:
    """What the running controller knows; empty if none runs. Nodes are never asked beside a controller that runs."""
    if not (state / "control.token").exists():
        return []
    try:
        with ControlClient.from_state(url, state) as client:
            return [*nodes(client.status()), *links(cluster, client.links())]
    except NodeLostError:
        return []
    except ResplitError as error:
        return [Diagnosis("error", "controller", f"{error}; wait until it serves, and see its log")]


def keys(cluster: ClusterConfig, folder: Path) -> Iterator[Diagnosis]:
    """The members' keys: those of the controller, and of the nodes that are here too."""
    create = "run `resplit keys CLUSTER.yaml`"
    for name in [CONTROLLER, *cluster.node_names]:
        if not (folder / name).exists():
            if name == CONTROLLER:
                yield Diagnosis("error", f"keys of {name}", f"{folder / name} is missing; {create}")
            continue
        try:
            Member.load_as(name, folder / name)
            left = read_certificate(folder / name / CERTIFICATE).not_valid_after_utc - datetime.now(UTC)
        except ResplitError as error:
            yield Diagnosis("error", f"keys of {name}", str(error))
            continue
        soon = left < _EXPIRES_SOON
        says = f"valid for {left.days} days" + ("; run `resplit keys CLUSTER.yaml --rotate`" if soon else "")
        yield Diagnosis("warning" if soon else "ok", f"keys of {name}", says)
    with contextlib.suppress(ResplitError):
        controller = Member.load(folder / CONTROLLER)
        for name in cluster.node_names:
            try:
                controller.public_wrap_key(name)
            except ResplitError as error:
                yield Diagnosis("error", f"keys of {name}", f"the controller has no key to seal blocks for it: {error}")


def disk(model: StoredModel, state: Path) -> Iterator[Diagnosis]:
    """Room in the state folder for the sealed blocks, beside the model itself."""
    needed = sum(block.weight_bytes for block in model.spec.blocks)
    free = shutil.disk_usage(state if state.exists() else Path()).free
    says = f"{free / 2**20:.0f} MiB are free, and sealed blocks take up to {1.12 * needed / 2**20:.0f} MiB"
    if free < 1.12 * needed:
        yield Diagnosis("error", "disk", f"{says}; make room in {state}, or choose another --state and --registry")
    else:
        yield Diagnosis("ok", "disk", says)


def fit(cluster: ClusterConfig, found: Sizing) -> Iterator[Diagnosis]:
    """Memory against need, and the pace against objectives and the deadline."""
    if found.reason:
        remedy = "add memory or nodes, trust more nodes, lower `kv_tokens`, or choose smaller `weights`"
        yield Diagnosis("error", "memory", f"the model does not fit: {found.reason}; {remedy}")
        return
    yield Diagnosis("ok", "memory", describe(found).splitlines()[-1 if not found.note else -2])
    if found.note:
        yield Diagnosis("warning", "load", f"{found.note}; add nodes, or lower `rate_rps`")
    context_s = cluster.limits.context_tokens * found.token_s
    if context_s > cluster.limits.deadline:
        says = f"{cluster.limits.context_tokens} tokens take {context_s:.0f} s, and the deadline is"
        remedy = "raise `limits.deadline`, or lower `limits.context_tokens`"
        yield Diagnosis("warning", "deadline", f"{says} {cluster.limits.deadline:g} s; {remedy}")
    for each in cluster.classes:
        latency_s = found.class_latency_s[each.name]
        if each.slo and latency_s > each.slo:
            says = f"requests take {latency_s:.2f} s, and the slo is {each.slo:g} s; add faster nodes, or raise it"
            yield Diagnosis("warning", f"class {each.name}", says)


def nodes(status: ClusterStatus) -> Iterator[Diagnosis]:
    """What a running controller knows of each node."""
    for node in status.nodes:
        about, address = f"node {node.node}", node.address
        if not node.answers:
            says = f"LOST: {node.fault}; restart it" if node.fault else _does_not_answer(node.node, address)
            yield Diagnosis("error", about, says)
        elif wrong := wrong_clock(node.clock_ahead_s):
            yield Diagnosis("error", about, wrong)
        else:
            refused = ", ".join(f"{count} {reason}" for reason, count in node.refusals.items())
            says = f"answers at {address}" + (f"; it refused messages: {refused}" if refused else "")
            yield Diagnosis("warning" if refused else "ok", about, says)


def links(cluster: ClusterConfig, rows: Iterable[LinkRow]) -> Iterator[Diagnosis]:
    """Latency and bandwidth between each two nodes, as the nodes measured them."""
    by_pair: defaultdict[tuple[str, str], list[LinkRow]] = defaultdict(list)
    for row in rows:
        by_pair[row.node, row.peer].append(row)
    for node in cluster.node_names:
        for peer in cluster.node_names:
            if node != peer:
                yield _link(node, peer, by_pair[node, peer])


def _link(node: str, peer: str, rows: list[LinkRow]) -> Diagnosis:
    about = f"link {node} to {peer}"
    if not rows:
        return Diagnosis("error", about, f"not measured: open the port of {peer} for {node}, and check both addresses")
    smallest = min(row.payload_bytes for row in rows)
    latency_s = min(row.seconds for row in rows if row.payload_bytes == smallest)
    speed, limit = _speed([row for row in rows if row.payload_bytes > 2 * smallest], latency_s)
    says = f"{latency_s * 1e3:.1f} ms, {limit}{8 * speed / 1e6:.0f} Mbit/s"
    if latency_s > _FAR_LINK_S or speed < _SLOW_LINK_BYTES_PER_S:
        return Diagnosis("warning", about, f"{says}: every token that crosses it waits; use a better network")
    return Diagnosis("ok", about, says)


def _speed(rows: list[LinkRow], latency_s: float) -> tuple[float, str]:
    """Bytes a second in the best of the messages `rows`, and "at least " if it took hardly longer than an empty one."""
    if not rows:
        return math.inf, ""
    best = max(rows, key=lambda row: row.payload_bytes / row.seconds)
    transfer_s = best.seconds - latency_s
    if transfer_s < 0.1 * best.seconds:
        return best.payload_bytes / best.seconds, "at least "
    return best.payload_bytes / transfer_s, ""


async def _network(cluster: ClusterConfig, keys: Path) -> list[Diagnosis]:
    """Ask each node from here, and have the nodes measure their links. No controller may run meanwhile."""
    try:
        member = Member.load(keys)
        addresses = {node.name: Address.parse(node.address) for node in cluster.nodes if node.address}
    except ResplitError as error:
        return [Diagnosis("error", "nodes", f"they cannot be asked: {error}")]
    findings = [
        Diagnosis("error", f"node {name}", "has no `address` in the file")
        for name in cluster.node_names
        if name not in addresses
    ]
    peers = {name: Peer(name, address, member) for name, address in addresses.items()}
    try:
        met = dict(zip(peers, await asyncio.gather(*map(_meet, peers.values())), strict=True))
        findings += met.values()
        answering = {name: peer for name, peer in peers.items() if peer.hello is not None}
        told = await asyncio.gather(*(_measured(cluster, peer, addresses, member) for peer in answering.values()))
        return findings + list(links(cluster, [row for rows in told for row in rows]))
    finally:
        await asyncio.gather(*(peer.disconnect() for peer in peers.values()))


async def _meet(peer: Peer) -> Diagnosis:
    """Connect to a node and hear its first words."""
    about, address = f"node {peer.name}", peer.address
    try:
        async with asyncio.timeout(_CONNECT_WITHIN_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
            writer.close()
    except (OSError, TimeoutError):
        return Diagnosis("error", about, _does_not_answer(peer.name, str(address)))
    opened = asyncio.Event()

    listening = asyncio.create_task(peer.listen(lambda token: None, opened.set))
    try:
        opening = asyncio.ensure_future(opened.wait())
        await asyncio.wait({listening, opening}, timeout=_CONNECT_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        opening.cancel()
        if listening.done() and isinstance(fault := listening.exception(), PeerFaultError):
            return Diagnosis("error", about, f"{fault}".removeprefix(f"{peer.name}: "))
        if not opened.is_set():
            says = f"something listens at {address}, and it is not this node with keys of this authority"
            return Diagnosis("error", about, f"{says}; copy `keys/{peer.name}` there and start `resplit node`")
        wrong = wrong_clock(peer.clock_ahead_s)
        return Diagnosis("error" if wrong else "ok", about, wrong or f"answers at {address}")
    finally:
        listening.cancel()
        await asyncio.wait({listening})


async def _measured(
    cluster: ClusterConfig, peer: Peer, addresses: dict[str, Address], member: Member
) -> tuple[LinkRow, ...]:
    """The links that a node measured to the others; empty if it could not be asked."""
    shapes = {name: cluster.link(peer.name, name) for name in addresses if name != peer.name}
    emulated = {name: Shape(link.latency, link.bandwidth) for name, link in shapes.items() if link}
    command = Connect(peer.name in cluster.trusted, frozenset(), addresses, emulated)
    hello = peer.hello
    assert hello is not None
    signed = CommandSigner(member).sign(
        command.kind, to_body(command), audience=peer.audience, epoch=hello.epoch, lifetime_s=_MEASURE_WITHIN_S
    )
    with contextlib.suppress(ResplitError):
        await peer.command(command.kind, signed, _MEASURE_WITHIN_S)
        report, _ = await peer.report(0)
        return report.rows.links
    return ()


def _does_not_answer(name: str, address: str) -> str:
    return f"nothing answers at {address}; start `resplit node --name {name}` there, and open the port in its firewall"
